"""What moves from one training step to the next, and what a step did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
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
    selected: Tensor  # fraction of the valid target pixels that pass the threshold
    mean_score: Tensor  # mean confidence of the teacher
    skipped: Tensor  # updates left out so far, for a loss or gradient that was not finite
    weight: float
    threshold: float | Tensor | None
    step: int

    def item(self, name: str) -> float:
        """One figure as a number; waits for the device.

        ValueError for a threshold that is not one: left to the loss, or one for each class.
        """
        value = getattr(self, name)
        if not _is_single(value):
            raise ValueError(f"{name}: got {value!r}, expected a single figure; read .{name}")
        return float(value)

    def as_dict(self) -> dict[str, float]:
        """All single figures as numbers, without a threshold per class; waits for the device."""
        tensors = torch.stack([getattr(self, name) for name in _TENSORS])
        figures = dict(zip(_TENSORS, tensors.tolist(), strict=True))  # one wait for all of them
        figures["weight"] = float(self.weight)
        if _is_single(self.threshold):
            figures["threshold"] = float(self.threshold)
        return figures | {"step": float(self.step)}


_TENSORS = ("loss", "supervised", "consistency", "selected", "mean_score", "skipped")


def _is_single(figure: float | Tensor | None) -> bool:
    return figure is not None and getattr(figure, "ndim", 0) == 0
