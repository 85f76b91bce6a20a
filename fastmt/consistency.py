"""Consistency loss: the student learns from the teacher's confident pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmt import arguments, backends, gradients, planes, reference
from fastmt.confidence import KINDS, shape_obstacle
from fastmt.reference import ConsistencyStats

LOSSES = ("mse", "kl", "soft_ce", "ce", "bce", "js")
CLASS_REDUCTIONS = ("sum", "mean")
WEIGHTS = ("mask", "confidence", "ratio", "none")
NORMALIZATIONS = ("all", "valid", "selected", "weight")


def consistency_loss(
    student: Tensor,
    teacher: Tensor | Sequence[Tensor],
    *,
    loss: str = "mse",
    class_reduction: str = "sum",
    confidence: str = "max_prob",
    weight: str = "mask",
    threshold: float | Tensor = 0.968,
    strict: bool = False,
    temperature: float = 1.0,
    pixel_weight: Tensor | None = None,
    valid: Tensor | None = None,
    normalize: str = "all",
    size: Sequence[int] | None = None,
    align_corners: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ConsistencyStats]:
    """Mean over pixels of weight * loss between p = softmax(student) and q = softmax(teacher / T).

    Args:
        student: logits (N, C, *spatial); float32, bfloat16, float16 or float64, any strides.
            Differentiable once. A sigmoid's one channel z is torch.cat([zeros_like(z), z], 1).
        teacher: logits of the same N and C, or a sequence of them, whose softmaxes are averaged.
            Never receives a gradient.
        loss: "mse" sum (p-q)^2; "kl" KL(q||p); "soft_ce" -sum q log p; "ce" -log p[argmax q];
            "bce" -sum q log p + (1-q) log(1-p); "js" the Jensen-Shannon divergence (nats).
        class_reduction: "sum" over classes, or their "mean" ("ce" has no sum and ignores it).
        confidence: score of q, see softmax_confidence: "max_prob", "entropy" or "margin".
        weight: of a pixel: "mask" 1 where score >= threshold; "confidence" the score where it
            passes; "ratio" the fraction of valid pixels that pass, the same for all; "none" 1.
        threshold: float, 0-dim tensor, or (C,) tensor indexed by the teacher's label.
        strict: a pixel passes with score > threshold instead of >=.
        temperature: of the teacher's softmax, positive.
        pixel_weight: float (N, *out), multiplies the weight; copied where it is not float32 or the
            logits are float16. Not differentiable.
        valid: bool (N, *out); False pixels are ignored.
        normalize: divide the sum by the number of "all" pixels, of "valid" ones, of "selected"
            ones (valid and passing), or by the "weight" (its sum). Nothing to divide by: loss 0.
        size, align_corners: up-sample both logits to `size` first, as F.interpolate does; a logit
            of weight 0 does not count, whatever it holds.
        return_stats: also return ConsistencyStats(selected, mean_score) over the valid pixels.

    Returns:
        0-dim loss, float32 (float64 for float64 logits). A pixel of weight 0 has a gradient of
        exactly 0, whatever its logits hold.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Source:
        Tarvainen & Valpola 2017 ("mse"); French et al. 2020 (masking by confidence, "bce");
        Yu et al. 2019 (entropy); Tranheden et al. 2021 ("ce" with "ratio").
    """
    members = arguments.members_of(teacher)
    any_float = 0.0 if type(threshold) is float else threshold  # a schedule has a new one each step
    maps, names = (pixel_weight, valid), (loss, class_reduction, confidence, weight, normalize)
    choice = backends.remembered(
        _choose,
        (student, members, size, *maps, any_float),
        (*names, temperature, strict, align_corners),
    )
    members = arguments.detached(members)
    if choice.backend == "eager":
        return reference.consistency_loss(
            student,
            members,
            loss=loss,
            class_reduction=class_reduction,
            confidence=confidence,
            weight=weight,
            threshold=threshold if isinstance(threshold, Tensor) else float(threshold),
            strict=strict,
            temperature=float(temperature),
            pixel_weight=pixel_weight,
            valid=valid,
            normalize=normalize,
            size=size,
            align_corners=align_corners,
            return_stats=return_stats,
        )
    logits = planes.logits_of_planes([student, *members], size, align_corners, choice.backend)
    student, *members = logits
    pixel_weight, valid = (planes.map_of_planes(pixels, student) for pixels in maps)
    wants_gradient = torch.is_grad_enabled() and student.requires_grad
    weights, unit = gradients.in_units(pixel_weight, student, wants_gradient)
    limits = _limits(threshold, student.device, choice.backend)
    sampling = (1 / float(temperature), choice.inside)
    call = (members, limits, weights, valid, choice.options, *sampling, align_corners)
    kernels = backends.operations(choice.backend)
    results = _ConsistencyLoss.record(student, kernels, call, wants_gradient, return_stats)
    value = results[0] if return_stats else results
    if normalize != "weight":
        value = gradients.times(value, unit)
    return (value, ConsistencyStats(*results[1:])) if return_stats else value


class _Choice(NamedTuple):
    backend: str
    inside: list[int] | None  # the size that the kernels up-sample to
    options: list[int]  # as kernels number them


def _choose(operands: tuple, options: tuple) -> _Choice:
    student, members, size, *_ = operands
    arguments.check_members("teacher", members)
    arguments.check_logits("student", student)
    _check_call(*operands)
    _check_options(*options)
    backends.warn_of_one_class("consistency_loss", student)
    inside = planes.plane_size([student, *members], size)
    choice = backends.choose(
        "consistency_loss",
        [student, *members],
        obstacle=shape_obstacle(student),
        upsampled=inside is not None,
        loss=options[0],
    )
    loss, class_reduction, confidence, weight, normalize, _, strict, _ = options
    numbers = [
        LOSSES.index(loss),
        CLASS_REDUCTIONS.index(class_reduction),
        KINDS.index(confidence),
        WEIGHTS.index(weight),
        int(strict),
        NORMALIZATIONS.index(normalize),
    ]
    return _Choice(choice.backend, inside, numbers)


def _check_call(
    student: Tensor,
    members: list[Tensor],
    size: Sequence[int] | None,
    pixel_weight: Tensor | None,
    valid: Tensor | None,
    threshold: float | Tensor,
) -> None:
    teacher, device = members[0], student.device
    if student.shape[:2] != teacher.shape[:2] or student.ndim != teacher.ndim:
        raise ValueError(
            f"teacher: got shape {arguments.shape(teacher)}, expected the N, C and rank of student "
            f"{arguments.shape(student)}"
        )
    arguments.check_device("teacher", teacher, device)
    named = [("student", student), *(("teacher", member) for member in members)]
    out = arguments.output_shape(named, size)
    arguments.check_map("pixel_weight", pixel_weight, out, arguments.FLOATS, device)
    arguments.check_map("valid", valid, out, (torch.bool,), device)
    arguments.check_threshold(threshold, student.shape[1], device)


def _check_options(
    loss: str,
    class_reduction: str,
    confidence: str,
    weight: str,
    normalize: str,
    temperature: float,
    strict: bool,
    align_corners: bool,
) -> None:
    arguments.check_choice("loss", loss, LOSSES)
    arguments.check_choice("class_reduction", class_reduction, CLASS_REDUCTIONS)
    arguments.check_choice("confidence", confidence, KINDS)
    arguments.check_choice("weight", weight, WEIGHTS)
    arguments.check_choice("normalize", normalize, NORMALIZATIONS)
    arguments.check_positive("temperature", temperature)
    arguments.check_flag("strict", strict)
    arguments.check_flag("align_corners", align_corners or False)  # None, as in F.interpolate


def _limits(threshold: float | Tensor, device: torch.device, backend: str) -> Tensor | float:
    """One threshold, or one for each class, where the kernels read it.

    A launch of a Triton kernel carries a number itself, which saves filling memory of the device;
    what is a node of a traced graph takes a tensor.
    """
    if not isinstance(threshold, Tensor):
        threshold = float(threshold)
        if backend == "triton" and not torch.compiler.is_compiling():
            return threshold
        return torch.full((1,), threshold, dtype=torch.float32, device=device)
    return threshold.detach().to(device, torch.float32, non_blocking=True).reshape(-1).contiguous()


class _ConsistencyLoss(gradients.KnownGradient):
    """Loss and gradient in one pass over the logits; the backward pass only scales the gradient."""

    @staticmethod
    def forward(ctx, student, kernels, call, wants_gradient, with_stats):
        value, selected, mean_score, scale, gradient = kernels.consistency_loss(
            student, *call, wants_gradient
        )
        ctx.set_materialize_grads(False)
        if wants_gradient:
            gradients.keep(ctx, kernels, student, [*call[0], *call[1:4]], gradient, scale)
            ctx.again = lambda z: kernels.consistency_loss(z, *call, True)[-1]
        if not with_stats:
            return value
        ctx.mark_non_differentiable(selected, mean_score)
        return value, selected, mean_score

    @staticmethod
    def backward(ctx, grad_value, *_):
        return gradients.hand_over(ctx, grad_value), None, None, None, None


class ConsistencyLoss(nn.Module):
    """Module twin of consistency_loss: the options are given once, the tensors at each call.

    Args:
        **options: loss, class_reduction, confidence, weight, threshold, strict, temperature,
            normalize, align_corners, return_stats, with the defaults of consistency_loss. A tensor
            as threshold is kept as a buffer that moves with the module.
    """

    _OPTIONS = (
        "loss",
        "class_reduction",
        "confidence",
        "weight",
        "threshold",
        "strict",
        "temperature",
        "normalize",
        "align_corners",
        "return_stats",
    )

    def __init__(self, **options: object) -> None:
        super().__init__()
        for name in options:
            if name not in self._OPTIONS:
                raise TypeError(f"{name}: not an option; expected {', '.join(self._OPTIONS)}")
        defaults = consistency_loss.__kwdefaults__
        self._options = {name: options.get(name, defaults[name]) for name in self._OPTIONS}
        threshold = self._options["threshold"]
        arguments.check_threshold_type(threshold)
        self.register_buffer("threshold", threshold if isinstance(threshold, Tensor) else None)
        others = ("threshold", "return_stats")
        _check_options(
            **{name: self._options[name] for name in self._OPTIONS if name not in others}
        )

    @property
    def options(self) -> dict[str, object]:
        """The options as they are now: a threshold that is a tensor is where the module is."""
        moved = {} if self.threshold is None else {"threshold": self.threshold}
        return {**self._options, **moved}

    @classmethod
    def preset(cls, name: str, **overrides: object) -> ConsistencyLoss:
        """The consistency loss of a published method; `overrides` replace single options.

        "mean_teacher" Tarvainen & Valpola 2017; "dacs" Tranheden et al. 2021; "daformer" Hoyer et
        al. 2022; "unimatch" Yang et al. 2023; "uamt" Yu et al. 2019: its threshold moves, so pass
        schedules.UncertaintyThreshold at each call; its teacher makes 8 noisy passes, as of
        MeanTeacher(passes=8), whose mean is the target. The authors' code takes one more pass as
        target: give that alone, weight="none", normalize="valid" and as `valid` where the score of
        softmax_confidence(passes, kind="entropy") is above the threshold.
        """
        arguments.check_choice("preset", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **overrides})

    def forward(
        self, student: Tensor, teacher: Tensor | Sequence[Tensor], **call: object
    ) -> Tensor | tuple[Tensor, ConsistencyStats]:
        """consistency_loss(student, teacher); `call` adds or overrides arguments of one call."""
        return consistency_loss(student, teacher, **{**self.options, **call})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


_RATIO_OF_CONFIDENT = {"loss": "ce", "weight": "ratio", "threshold": 0.968, "normalize": "all"}
PRESETS: dict[str, dict[str, object]] = {
    "mean_teacher": {"loss": "mse", "class_reduction": "mean", "weight": "none"},
    "uamt": {
        "loss": "mse",
        "class_reduction": "mean",
        "confidence": "entropy",
        "threshold": 0.25,
        "strict": True,
        "normalize": "selected",
    },
    "dacs": _RATIO_OF_CONFIDENT,
    "daformer": _RATIO_OF_CONFIDENT,
    "unimatch": {"loss": "ce", "weight": "mask", "threshold": 0.95, "normalize": "valid"},
}
