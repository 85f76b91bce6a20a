"""What a call of the losses asks for, in the terms of the kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmt.kernels.sums import NORMALIZATIONS, GradientScale

KINDS = ("max_prob", "entropy", "margin")
LOSSES = ("mse", "kl", "soft_ce", "ce", "bce", "js")
WEIGHTS = ("mask", "confidence", "ratio", "none")
# Columns that a loss keeps in registers at once, as the compiler's register counts have it.
COLUMNS = {"mse": 2, "kl": 3, "soft_ce": 2.3, "ce": 2, "bce": 6, "js": 5}


@dataclasses.dataclass
class ConsistencyCall:
    """Operands and options of consistency_loss besides the student."""

    teacher: Sequence[Tensor]
    threshold: Tensor  # float32, one or one for each class
    pixel_weight: Tensor | None  # float32
    valid: Tensor | None
    inverse_temperature: float
    scale: GradientScale
    columns: float
    constants: dict[str, object]

    @classmethod
    def of(
        cls,
        student: Tensor,
        teacher: Sequence[Tensor],
        threshold: Tensor,
        pixel_weight: Tensor | None,
        valid: Tensor | None,
        options: Sequence[int],
        inverse_temperature: float,
        pixels: int,
    ) -> ConsistencyCall:
        loss, class_mean, kind, weight, strict, normalize = options
        known = normalize == 0 or (normalize == 1 and valid is None)
        mean = class_mean and LOSSES[loss] != "ce"
        return cls(
            teacher,
            threshold,
            pixel_weight,
            None if valid is None else valid.view(torch.uint8),
            inverse_temperature,
            GradientScale(student, pixels, known and WEIGHTS[weight] != "ratio"),
            COLUMNS[LOSSES[loss]] + (len(teacher) > 1),
            {
                "LOSS": LOSSES[loss],
                "CLASS_SHARE": 1 / student.shape[1] if mean else 1.0,
                "KIND": KINDS[kind],
                "WEIGHT": WEIGHTS[weight],
                "STRICT": bool(strict),
                "BY_LABEL": threshold.numel() > 1,
                "SUM_WEIGHTS": NORMALIZATIONS[normalize] == "weight",
            },
        )


@dataclasses.dataclass
class CrossEntropyCall:
    """Operands and options of cross_entropy besides the logits."""

    labels: Tensor  # uint8 or int64
    pixel_weight: Tensor | None  # float32
    class_weight: Tensor | None  # float32
    ignore_index: int
    smoothing: float
    scale: GradientScale

    @property
    def plain(self) -> bool:
        return self.class_weight is None and self.smoothing == 0
