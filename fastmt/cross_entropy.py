"""Cross-entropy: the student learns from labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmt import arguments, backends, gradients, planes, reference
from fastmt.confidence import shape_obstacle
from fastmt.environment import Variable

_CHECK = Variable("FASTMT_CHECK")
NORMALIZATIONS = ("all", "valid", "weight")


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    pixel_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: str = "valid",
    align_corners: bool = False,
) -> Tensor:
    """Mean over pixels of -w_y log softmax(logits)_y.

    Args:
        logits: (N, C, *spatial); float32, bfloat16, float16 or float64, any strides.
            Differentiable once.
        labels: (N, *out), uint8 or int64, class ids 0..C-1 or ignore_index. Logits of another
            spatial size are up-sampled to the labels' as by F.interpolate (bilinear in 2-D).
        ignore_index: pixels with this label have loss and gradient exactly 0.
        pixel_weight: float (N, *out), multiplied in; copied where it is not float32 or the
            logits are float16. Not differentiable.
        class_weight: float (C,). Not differentiable. A class of weight 0 adds nothing, even with a
            logit of -inf, where PyTorch has NaN; nor, without smoothing, do the pixels that have
            its label, whatever their logits hold.
        label_smoothing: e in [0, 1]: the target is (1 - e) * one-hot + e / C, as in PyTorch.
        normalize: divide the sum by the number of "all" pixels, of "valid" (not ignored) ones, or
            by the "weight", the sum of pixel_weight * class_weight[label] (PyTorch's mean).
        align_corners: as in F.interpolate.

    Returns:
        0-dim loss, float32 (float64 for float64 logits); 0 where there is nothing to divide by.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; a label outside
        0..C-1 is named, on a GPU only where FASTMT_CHECK=1 is set, since that waits for the device;
        else it makes loss and gradient NaN there.
    """
    tensors = (logits, labels, pixel_weight, class_weight)
    choice = backends.remembered(
        _choose, *tensors, ignore_index, normalize, label_smoothing, align_corners
    )
    if choice.backend == "eager":
        if _checks_labels(labels) and _is_readable(labels):
            arguments.check_labels(labels, logits.shape[1], ignore_index)
        return reference.cross_entropy(
            logits,
            labels,
            ignore_index=ignore_index,
            pixel_weight=pixel_weight,
            class_weight=class_weight,
            label_smoothing=float(label_smoothing),
            normalize=normalize,
            align_corners=align_corners,
        )
    if logits.ndim != 4:
        (logits,) = planes.logits_of_planes(
            [logits], labels.shape[1:], align_corners, choice.backend
        )
        labels, pixel_weight = (planes.map_of_planes(p, logits) for p in (labels, pixel_weight))
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    pixels, pixel_unit = gradients.in_units(pixel_weight, logits, wants_gradient)
    classes, class_unit = gradients.in_units(class_weight, logits, wants_gradient)
    weights = [pixels, None if classes is None else classes.contiguous()]
    # Python's own numbers: Triton compiles for none of NumPy's.
    options = [int(ignore_index), NORMALIZATIONS.index(normalize)]
    call = (labels, *weights, options, float(label_smoothing), align_corners)
    kernels = backends.operations(choice.backend)
    value = _CrossEntropy.record(logits, kernels, call, wants_gradient)
    return value if normalize == "weight" else gradients.times(value, pixel_unit, class_unit)


def _choose(
    logits: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    normalize: str,
    label_smoothing: float,
    align_corners: bool,
) -> backends.Choice:
    arguments.check_logits("logits", logits)
    classes, device = logits.shape[1], logits.device
    _check_labels_shape(logits, labels)
    arguments.check_map("pixel_weight", pixel_weight, labels.shape, arguments.FLOATS, device)
    arguments.check_map("class_weight", class_weight, (classes,), arguments.FLOATS, device)
    _check_options(ignore_index, normalize, label_smoothing, align_corners)
    backends.warn_of_one_class("cross_entropy", logits)
    return backends.choose(
        "cross_entropy",
        [logits],
        obstacle=shape_obstacle(logits),
        upsampled=planes.plane_size([logits], labels.shape[1:]) is not None,
    )


def _check_options(
    ignore_index: int, normalize: str, label_smoothing: float, align_corners: bool
) -> None:
    arguments.check_index("ignore_index", ignore_index)
    arguments.check_choice("normalize", normalize, NORMALIZATIONS)
    arguments.check_between("label_smoothing", label_smoothing, 0, 1)
    arguments.check_flag("align_corners", align_corners or False)  # None, as in F.interpolate


def _check_labels_shape(logits: Tensor, labels: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: got {type(labels).__name__}, expected a tensor")
    if labels.ndim != logits.ndim - 1 or labels.shape[:1] != logits.shape[:1]:
        raise ValueError(
            f"labels: got shape {arguments.shape(labels)}, expected ({logits.shape[0]}, *out) with "
            f"{logits.ndim - 2} spatial dimensions for logits {arguments.shape(logits)}"
        )
    arguments.check_map("labels", labels, labels.shape, (torch.uint8, torch.int64), logits.device)
    if labels.shape[1:] != logits.shape[2:]:
        size = tuple(labels.shape[1:])
        arguments.output_shape([("logits", logits)], size, got="labels: got size")


def _checks_labels(of_the_call: Tensor) -> bool:
    return of_the_call.is_cpu or _CHECK.value() == "1"


def _is_readable(labels: Tensor) -> bool:
    """Not in a trace, nor under torch.func, nor of fake tensors, which hold no values."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not traced and not hasattr(labels, "fake_mode")


def _refuse(wrong: Tensor, labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raise where the kernel has met labels out of range, of which it says how many."""
    if not _checks_labels(wrong):
        return
    if torch.compiler.is_compiling():  # the graph itself raises, without a value to name
        message = f"labels: got a label outside 0..{classes - 1} that is not {ignore_index}"
        torch._assert_async(wrong == 0, message)
    elif wrong:
        arguments.check_labels(labels, classes, ignore_index)


class _CrossEntropy(gradients.KnownGradient):
    """Loss and gradient in one pass over the logits; the backward pass only scales the gradient."""

    @staticmethod
    def forward(ctx, logits, kernels, call, wants_gradient):
        value, scale, gradient, wrong = kernels.cross_entropy(logits, *call, wants_gradient)
        _refuse(wrong, call[0], logits.shape[1], call[3][0])
        ctx.set_materialize_grads(False)
        if wants_gradient:
            gradients.keep(ctx, kernels, logits, call[:3], gradient, scale)
            ctx.again = lambda z: kernels.cross_entropy(z, *call, True)[2]
        return value

    @staticmethod
    def backward(ctx, grad_value):
        return gradients.hand_over(ctx, grad_value), None, None, None


class CrossEntropy(nn.Module):
    """Module twin of cross_entropy: the options are given once, the tensors at each call.

    Args:
        class_weight: float (C,), kept as a buffer that moves with the module.
        **options: ignore_index, label_smoothing, normalize, align_corners, with the defaults of
            cross_entropy.
    """

    _OPTIONS = ("ignore_index", "label_smoothing", "normalize", "align_corners")

    def __init__(self, *, class_weight: Tensor | None = None, **options: object) -> None:
        super().__init__()
        for name in options:
            if name not in self._OPTIONS:
                raise TypeError(f"{name}: not an option; expected {', '.join(self._OPTIONS)}")
        defaults = cross_entropy.__kwdefaults__
        self.options = {name: options.get(name, defaults[name]) for name in self._OPTIONS}
        _check_options(**self.options)
        self.register_buffer("class_weight", class_weight)

    def forward(self, logits: Tensor, labels: Tensor, **call: object) -> Tensor:
        """cross_entropy(logits, labels); `call` adds or overrides arguments of one call."""
        options = {"class_weight": self.class_weight, **self.options, **call}
        return cross_entropy(logits, labels, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
