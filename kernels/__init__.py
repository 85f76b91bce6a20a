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
    sums,
)
from fastmt.kernels.calls import KINDS, WEIGHTS, ConsistencyCall, CrossEntropyCall
from fastmt.kernels.ema import ema_update_, scale_, scale_kernel
from fastmt.kernels.sums import NORMALIZATIONS, GradientScale

__all__ = ["consistency_loss", "cross_entropy", "ema_update_", "scale_", "softmax_confidence"]

INTERPRETED = not isinstance(scale_kernel, triton.JITFunction)
Size = Sequence[int] | None


def as_it_lies(tensor: Tensor | None) -> Tensor | None:
    """The tensor as kernels read it: a view that negates what is in memory becomes a copy."""
    return None if tensor is None else tensor.resolve_neg()


def softmax_confidence(
    logits: Sequence[Tensor], kind: int, inverse_temperature: float, size: Size, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """(score, label) of each output pixel, (N, *out)."""
    logits = [as_it_lies(member) for member in logits]
    first = logits[0]
    out = (first.shape[0], *(size or first.shape[2:]))
    score = first.new_empty(out, dtype=torch.float32)
    label = first.new_empty(out, dtype=torch.int64)
    if score.numel() == 0:
        return score, label
    call = (logits, KINDS[kind], inverse_temperature)
    if size is None:
        dense_confidence.confidence(*call, score, label)
    else:
        cells_confidence.confidence(*call, align_corners, score, label)
    return score, label


def consistency_loss(
    student: Tensor,
    teacher: Sequence[Tensor],
    threshold: Tensor,
    pixel_weight: Tensor | None,
    valid: Tensor | None,
    options: Sequence[int],
    inverse_temperature: float,
    size: Size,
    align_corners: bool,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, selected, mean_score, scale, gradient): d loss / d student is scale * gradient."""
    student, threshold, pixel_weight = map(as_it_lies, (student, threshold, pixel_weight))
    teacher = [as_it_lies(member) for member in teacher]
    pixels = student.shape[0] * math.prod(size or student.shape[2:])
    gradient = torch.empty_like(student) if wants_gradient else student.new_empty(0)
    if pixels == 0:
        return *(student.new_zeros((), dtype=torch.float32) for _ in range(4)), gradient
    call = ConsistencyCall.of(
        student, teacher, threshold, pixel_weight, valid, options, inverse_temperature, pixels
    )
    filled = gradient if wants_gradient else None
    if size is None:
        partials = dense_consistency.consistency(call, student, filled)
    else:
        partials = cells_consistency.consistency(call, student, tuple(size), align_corners, filled)
    normalize, ratio = NORMALIZATIONS[options[5]], WEIGHTS[options[3]] == "ratio"
    return *sums.consistency_total(partials, call.scale, pixels, normalize, ratio), gradient


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    options: Sequence[int],
    label_smoothing: float,
    align_corners: bool,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, scale, gradient, labels out of range, the lowest of them).

    d loss / d logits is scale * gradient; a label out of range makes both NaN.
    """
    logits, pixel_weight, class_weight = map(as_it_lies, (logits, pixel_weight, class_weight))
    pixels, (ignore_index, normalize) = labels.numel(), options
    gradient = torch.empty_like(logits) if wants_gradient else logits.new_empty(0)
    if pixels == 0:
        loss, scale = (logits.new_zeros((), dtype=torch.float32) for _ in range(2))
        wrong, wrong_label = (logits.new_zeros((), dtype=torch.int64) for _ in range(2))
        return loss, scale, gradient, wrong, wrong_label
    scale = GradientScale(logits, pixels, normalize == 0)
    call = CrossEntropyCall(
        labels, pixel_weight, class_weight, ignore_index, label_smoothing, scale
    )
    filled = gradient if wants_gradient else None
    if labels.shape[1:] == logits.shape[2:]:
        partials = dense_cross_entropy.cross_entropy(call, logits, filled)
    else:
        partials = cells_cross_entropy.cross_entropy(call, logits, align_corners, filled)
    denominator = ("all", "valid", "weight")[normalize]
    loss, outside, wrong, wrong_label = sums.cross_entropy_total(
        *partials, scale, pixels, denominator
    )
    return loss, outside, gradient, wrong, wrong_label
