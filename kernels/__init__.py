"""The Triton kernels, installed as fastmt.kernels; the names and signatures of csrc/library.cpp.

Everything runs on the device, in the order of the stream, without waiting for it. Under Triton's
interpreter (TRITON_INTERPRET=1) the same kernels run on CPU tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from fastmt.kernels import (
    cells_confidence,
    cells_consistency,
    cells_cross_entropy,
    dense_confidence,
    dense_consistency,
    dense_cross_entropy,
)
from fastmt.kernels.calls import KINDS, ConsistencyCall, CrossEntropyCall, Run
from fastmt.kernels.ema import ema_update_, scale_, scale_kernel
from fastmt.kernels.launch import Launch, layout_of, prepared
from fastmt.kernels.slices import resample_slices, resample_slices_backward
from fastmt.kernels.sums import GradientScale, scalars
from fastmt.kernels.views import device_of

__all__ = [
    "consistency_loss",
    "cross_entropy",
    "ema_update_",
    "resample_slices",
    "resample_slices_backward",
    "scale_",
    "softmax_confidence",
]

INTERPRETED = not isinstance(scale_kernel, triton.JITFunction)
Size = Sequence[int] | None


def as_it_lies(tensor: Tensor | None) -> Tensor | None:
    """The tensor as kernels read it: a view that negates what is in memory becomes a copy."""
    return tensor.resolve_neg() if tensor is not None and tensor.is_neg() else tensor


def softmax_confidence(
    logits: Sequence[Tensor], kind: int, inverse_temperature: float, size: Size, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """(score, label) of each output pixel, (N, *out)."""
    logits, size = tuple(map(as_it_lies, logits)), size and tuple(size)
    first = logits[0]
    key = (softmax_confidence, kind, size, align_corners, *map(layout_of, logits))
    with device_of(first):
        launch, out = prepared(key, _confidence, logits, KINDS[kind], size, align_corners)
        score = torch.empty_strided(*out, dtype=torch.float32, device=first.device)
        label = torch.empty_like(score, dtype=torch.int64)
        if launch is not None:
            launch(logits, score, label, inverse_temperature)
    return score, label


def _confidence(
    logits: Sequence[Tensor], kind: str, size: Size, align_corners: bool
) -> tuple[Launch | None, tuple[Sequence[int], Sequence[int]]]:
    """The launch, of no pixels None, and what empty_strided wants to know of its results."""
    first = logits[0]
    score = torch.empty((len(first), *(size or first.shape[2:])), device="meta")
    out = score.shape, score.stride()
    if score.numel() == 0:
        return None, out
    if size is None:
        return dense_confidence.prepare(logits, kind, score), out
    return cells_confidence.prepare(logits, kind, score, align_corners), out


def consistency_loss(
    student: Tensor,
    teacher: Sequence[Tensor],
    threshold: Tensor | float,
    pixel_weight: Tensor | None,
    valid: Tensor | None,
    options: Sequence[int],
    inverse_temperature: float,
    size: Size,
    align_corners: bool,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, selected, mean_score, scale, gradient): d loss / d student is scale * gradient.

    threshold: float32, one or one for each class, or a number, which a launch itself carries.
    """
    student, pixel_weight = as_it_lies(student), as_it_lies(pixel_weight)
    if not isinstance(threshold, float):
        threshold = as_it_lies(threshold)
    teacher = tuple(map(as_it_lies, teacher))
    gradient = torch.empty_like(student) if wants_gradient else None
    empty = student.new_empty(0) if gradient is None else gradient
    if student.numel() == 0:
        return *(student.new_zeros((), dtype=torch.float32) for _ in range(4)), empty
    valid = None if valid is None else valid.view(torch.uint8)
    size, options = size and tuple(size), tuple(options)
    limit = "number"
    if isinstance(threshold, Tensor):
        limit = "by label" if threshold.numel() > 1 else "one"
    layouts = map(layout_of, (student, pixel_weight, valid, *teacher))
    key = (consistency_loss, size, align_corners, wants_gradient, limit, options, *layouts)
    maps = (pixel_weight, valid)
    operands = (student, teacher, *maps, limit, options, size, align_corners, gradient)
    results = scalars(student, 4)
    with device_of(student):  # what is prepared asks for the current device's capability
        run = prepared(key, _consistency, *operands)
        run(student, gradient, teacher, *maps, threshold, inverse_temperature, results)
    return *results, empty


def _consistency(
    student: Tensor,
    teacher: Sequence[Tensor],
    pixel_weight: Tensor | None,
    valid: Tensor | None,
    limit: str,
    options: Sequence[int],
    size: Size,
    align_corners: bool,
    gradient: Tensor | None,
) -> Run:
    pixels = student.shape[0] * math.prod(size or student.shape[2:])
    call = ConsistencyCall.of(student, teacher, limit, pixel_weight, valid, options, pixels)
    if size is None:
        return dense_consistency.prepare(call, student, gradient)
    return cells_consistency.prepare(call, student, size, align_corners, gradient)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    options: Sequence[int],
    label_smoothing: float,
    align_corners: bool,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, scale, gradient, labels out of range): d loss / d logits is scale * gradient.

    A label out of range makes both NaN.
    """
    logits, pixel_weight, class_weight = map(as_it_lies, (logits, pixel_weight, class_weight))
    gradient = torch.empty_like(logits) if wants_gradient else None
    empty = logits.new_empty(0) if gradient is None else gradient
    if labels.numel() == 0:
        loss, scale, wrong = (logits.new_zeros((), dtype=torch.float32) for _ in range(3))
        return loss, scale, empty, wrong
    options, plain = tuple(options), class_weight is None and label_smoothing == 0
    layouts = map(layout_of, (logits, labels, pixel_weight))
    how = (align_corners, wants_gradient, plain, class_weight is None, options)
    key = (cross_entropy, *how, *layouts)
    operands = (logits, labels, pixel_weight, plain, options, align_corners, gradient)
    results = scalars(logits, 3)
    with device_of(logits):
        run = prepared(key, _cross_entropy, *operands)
        run(logits, gradient, labels, pixel_weight, class_weight, label_smoothing, results)
    loss, scale, wrong = results
    return loss, scale, empty, wrong


def _cross_entropy(
    logits: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    plain: bool,
    options: Sequence[int],
    align_corners: bool,
    gradient: Tensor | None,
) -> Run:
    pixels, (ignore_index, normalize) = labels.numel(), options
    scale = GradientScale(logits, pixels, normalize == 0)
    total = {"NORMALIZE": ("all", "valid", "weight")[normalize]}
    operands = (labels, pixel_weight, plain, ignore_index)
    call = CrossEntropyCall(*operands, float(pixels), scale, total)
    if labels.shape[1:] == logits.shape[2:]:
        return dense_cross_entropy.prepare(call, logits, gradient)
    return cells_cross_entropy.prepare(call, logits, align_corners, gradient)
