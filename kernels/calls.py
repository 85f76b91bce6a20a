"""What a call of the losses asks for, in the terms of the kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor

from fastmt.kernels.sums import NORMALIZATIONS, GradientScale

KINDS = ("max_prob", "entropy", "margin")
LOSSES = ("mse", "kl", "soft_ce", "ce", "bce", "js")
WEIGHTS = ("mask", "confidence", "ratio", "none")
# Columns that a loss keeps in registers at once, as the compiler's register counts have it.
COLUMNS = {"mse": 2, "kl": 3, "soft_ce": 2.3, "ce": 2, "bce": 6, "js": 5}


Run = Callable[..., None]  # all launches of a call, prepared for layouts and options; of no tensor


@dataclasses.dataclass
class ConsistencyCall:
    """Operands and options of consistency_loss besides the student, to prepare its passes for."""

    teacher: Sequence[Tensor]
    pixel_weight: Tensor | None  # float32
    valid: Tensor | None  # uint8
    pixels: float
    scale: GradientScale
    columns: float
    constants: dict[str, object]
    total: dict[str, object]  # constants of what adds up the sums

    @classmethod
    def of(
        cls,
        student: Tensor,
        teacher: Sequence[Tensor],
        limit: str,
        pixel_weight: Tensor | None,
        valid: Tensor | None,
        options: Sequence[int],
        pixels: int,
    ) -> ConsistencyCall:
        loss, class_mean, kind, weight, strict, normalize = options
        known = normalize == 0 or (normalize == 1 and valid is None)
        class_share = 1 / student.shape[1] if class_mean and LOSSES[loss] != "ce" else 1.0
        known = known and WEIGHTS[weight] != "ratio"
        scale = GradientScale(student, pixels, known, class_share)
        return cls(
            teacher,
            pixel_weight,
            valid,
            float(pixels),
            scale,
            COLUMNS[LOSSES[loss]] + (len(teacher) > 1),
            {
                "LOSS": LOSSES[loss],
                "CLASS_SHARE": class_share,
                "KIND": KINDS[kind],
                "WEIGHT": WEIGHTS[weight],
                "STRICT": bool(strict),
                "LIMIT": limit,
                "SUM_WEIGHTS": NORMALIZATIONS[normalize] == "weight",
            },
            {
                "NORMALIZE": NORMALIZATIONS[normalize],
                "RATIO": WEIGHTS[weight] == "ratio",
            },
        )


@dataclasses.dataclass
class CrossEntropyCall:
    """Operands and options of cross_entropy besides the logits, to prepare its passes for."""

    labels: Tensor  # uint8 or int64
    pixel_weight: Tensor | None  # float32
    plain: bool  # without weights of classes and smoothing
    ignore_index: int
    pixels: float
    scale: GradientScale
    total: dict[str, object]  # constants of what adds up the sums
