"""Byte models: the traffic that no implementation of an operation can avoid.

Every input is read once and every output written once. A second pass, as for a denominator that is
known only at the end, is not counted: it shows as a lower GB/s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor


def consistency_loss(student: Tensor, teachers: Sequence[Tensor], *maps: Tensor | None) -> int:
    """Forward and backward: read student, teachers and pixel maps, write the gradient."""
    return 2 * student.nbytes + _total(teachers) + _total(m for m in maps if m is not None)


def softmax_confidence(logits: Sequence[Tensor], size: Sequence[int] | None = None) -> int:
    """Read the logits, write a float32 score and an int64 label of each output pixel."""
    pixels = len(logits[0]) * math.prod(size or logits[0].shape[2:])
    return _total(logits) + (4 + 8) * pixels


def cross_entropy(logits: Tensor, labels: Tensor) -> int:
    """Forward and backward: read logits and labels, write the gradient."""
    return 2 * logits.nbytes + labels.nbytes


def ema_update_(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> int:
    """Read teacher and student, write the teacher: 12 bytes per float32 parameter."""
    return 2 * _total(teacher) + _total(student)


def copy(source: Tensor) -> int:
    """Read the source, write the copy: 8 bytes per float32 value."""
    return 2 * source.nbytes


def _total(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
