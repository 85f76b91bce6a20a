"""What moves from one training step to the next, and what a step did."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from torch import Tensor


class Scheduled(NamedTuple):
    """What moves from step to step: numbers, or in a capturable trainer tensors of its device."""

    weight: float | Tensor
    threshold: float | Tensor | None  # None leaves it to the consistency loss
    decay: Tensor | None  # None leaves it to the teacher


@dataclass(frozen=True)
class StepReport:
    """What one step did: tensors stay on the device until `item` or `as_dict` reads them."""

    loss: Tensor  # supervised + weight * consistency
    supervised: Tensor
    consistency: Tensor
    selected: Tensor  # fraction of the target's pixels that taught
    mean_score: Tensor  # mean confidence of the teacher
    skipped: Tensor  # updates left out so far, for a loss or gradient that was not finite
    weight: float
    threshold: float | Tensor | None
    step: int

    def item(self, name: str) -> float:
        """One figure as a number; waits for the device."""
        return float(getattr(self, name))

    def as_dict(self) -> dict[str, float]:
        """All single figures as numbers, without a threshold per class; waits for the device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        single = {n: v for n, v in values.items() if getattr(v, "ndim", 0) == 0 and v is not None}
        return {name: float(value) for name, value in single.items()}
