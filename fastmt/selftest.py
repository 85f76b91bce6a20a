"""Trials of every operation against the reference in float64, on any device.

`fastmt.doctor` runs the plain ones; options make others of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmt import backends, reference
from fastmt.confidence import softmax_confidence
from fastmt.consistency import consistency_loss
from fastmt.cross_entropy import cross_entropy
from fastmt.ema import ema_update_

# The largest error, relative to the largest value of a tensor.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DECAY = 0.99


class Sizes(NamedTuple):
    """Images, classes, the pixels of low-resolution logits and those of the output."""

    batch: int = 2
    classes: int = 19
    low: tuple[int, ...] = (33, 37)
    out: tuple[int, ...] = (70, 91)


@dataclass
class Trial:
    """A call of an operation on tensors of its own, and what it has to give."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    expected: Callable[[], Sequence[Tensor]]  # float64 (labels int64), on the CPU
    leaf: Tensor | None = None  # whose gradient belongs to the result
    written: Sequence[Tensor] = field(default_factory=tuple)  # what the call writes into

    def choice(self) -> backends.Choice:
        """Which implementation serves the call, and why."""
        return backends.explain(self.function, *self.arguments, **self.options)

    def run(self) -> Sequence[Tensor]:
        """What the call computes, with the gradient where there is one."""
        result = self.function(*self.arguments, **self.options)
        if self.leaf is None:
            return result or self.written
        self.leaf.grad = None
        result.backward()
        return result.detach(), self.leaf.grad

    def error(self) -> float:
        """The largest error of a first call, relative to the largest value of its tensor."""
        actual, expected = self.run(), self.expected()
        return max(error(*pair) for pair in zip(actual, expected, strict=True))


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest error relative to the largest expected value; NaN for another shape."""
    if actual.shape != expected.shape:
        return float("nan")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual.cpu(), expected.cpu()) else float("inf")
    if not expected.numel():
        return 0.0
    largest = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((actual.detach().to(expected).sub(expected).abs().max() / largest).cpu())


def consistency(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes,
    *,
    upsampled: bool = False,
    members: int = 1,
    maps: bool = False,
    by_class: bool = False,
    **options: Any,
) -> Trial:
    """consistency_loss of random logits: with several teachers, pixel maps, class thresholds."""
    student, *teachers = (_logits(sizes, upsampled, seed, dtype) for seed in range(members + 1))
    options["size"] = sizes.out if upsampled else None
    options["threshold"] = _clear_threshold(_scored(teachers, options), by_class, sizes.classes)
    if maps:
        options |= _maps(sizes)
    leaf = student.detach().to(device).requires_grad_()
    return Trial(
        consistency_loss,
        (leaf, [member.to(device) for member in teachers]),
        _moved(options, device),
        partial(_truth, reference.consistency_loss, student, teachers, options),
        leaf,
    )


def labelled(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes,
    *,
    upsampled: bool = False,
    maps: bool = False,
    label_dtype: torch.dtype = torch.int64,
    **options: Any,
) -> Trial:
    """cross_entropy of random logits, a tenth of the labels ignored; weights by pixel and class."""
    logits, generator = _logits(sizes, upsampled, 0, dtype), torch.Generator().manual_seed(1)
    labels = torch.randint(sizes.classes, (sizes.batch, *sizes.out), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    if maps:
        options["pixel_weight"] = _maps(sizes)["pixel_weight"]
        options["class_weight"] = torch.linspace(0.5, 2, sizes.classes)
    leaf = logits.detach().to(device).requires_grad_()
    return Trial(
        cross_entropy,
        (leaf, labels.to(device, label_dtype)),
        _moved(options, device),
        partial(_truth, reference.cross_entropy, logits, labels, options),
        leaf,
    )


def confidence(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes,
    *,
    upsampled: bool = False,
    **options: Any,
) -> Trial:
    """softmax_confidence of random logits."""
    logits = _logits(sizes, upsampled, 1, dtype)
    options["size"] = sizes.out if upsampled else None
    expected = partial(reference.softmax_confidence, logits.double(), **options)
    return Trial(softmax_confidence, (logits.to(device),), options, expected)


def average(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Trial:
    """Tensors of many lengths: of one element, of one vector and a rest, of several chunks."""
    lengths = (1, 7, 64 * sizes.classes, 16 * 1024 + 3, sizes.batch * math.prod(sizes.out))
    generator = torch.Generator().manual_seed(0)
    teacher = [torch.randn(n, generator=generator) for n in lengths]
    student = [torch.randn(n, generator=generator).to(dtype) for n in lengths]

    def expected() -> list[Tensor]:
        averages = [t.double() for t in teacher]
        reference.ema_update_(averages, [s.double() for s in student], DECAY)
        return averages

    written = [t.to(device, copy=True) for t in teacher]
    arguments = (written, [s.to(device) for s in student], DECAY)
    return Trial(ema_update_, arguments, {}, expected, written=written)


Build = Callable[[torch.device, torch.dtype, Sizes], Trial]
PLAIN: dict[str, Build] = {
    "consistency_loss": consistency,
    "consistency_loss, up-sampled": partial(consistency, upsampled=True),
    "cross_entropy": labelled,
    "cross_entropy, up-sampled": partial(labelled, upsampled=True),
    "softmax_confidence": confidence,
    "softmax_confidence, up-sampled": partial(confidence, upsampled=True),
    "ema_update_": average,
}


def serving(build: Build, device: torch.device) -> list[str]:
    """The names of the backends whose kernels serve a trial."""
    trial, found = build(device, torch.float32, Sizes()), []
    for name in backends.KERNELS:
        with backends.backend(name):
            found += [name] if trial.choice().backend == name else []
    return found


def _logits(sizes: Sizes, upsampled: bool, seed: int, dtype: torch.dtype) -> Tensor:
    shape = (sizes.batch, sizes.classes, *(sizes.low if upsampled else sizes.out))
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def _maps(sizes: Sizes) -> dict[str, Tensor]:
    shape, generator = (sizes.batch, *sizes.out), torch.Generator().manual_seed(3)
    weight, chance = torch.rand(2, *shape, generator=generator)
    return {"pixel_weight": weight, "valid": chance > 0.2}


def _scored(teachers: list[Tensor], options: dict[str, Any]) -> reference.Confidence:
    chosen = {
        name: options[name] for name in {"temperature", "size", "align_corners"} & options.keys()
    }
    kind = options.get("confidence", "max_prob")
    return reference.softmax_confidence([m.double() for m in teachers], kind=kind, **chosen)


def _clear_threshold(scored: reference.Confidence, by_class: bool, classes: int) -> float | Tensor:
    """Amid the widest gap of the middle scores, where rounding decides about no pixel."""

    def clear(scores: Tensor) -> float:
        ordered = scores.flatten().sort().values
        middle = ordered[len(ordered) // 4 : 3 * len(ordered) // 4]
        widest = middle.diff().argmax()
        return float(middle[widest : widest + 2].mean())

    if not by_class:
        return clear(scored.score)
    return torch.tensor([clear(scored.score[scored.label == c]) for c in range(classes)])


def _moved(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}


def _truth(
    function: Callable[..., Tensor], logits: Tensor, other: Any, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the reference in float64."""
    leaf = logits.detach().double().requires_grad_()
    loss = function(leaf, _wide(other), **{name: _wide(v) for name, v in options.items()})
    loss.backward()
    return loss.detach(), leaf.grad


def _wide(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_wide, value))
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value
