"""Schedules: how a weight or a threshold changes with the iteration.

A schedule is any callable from the iteration (an int, 0 for the first step) to a float. The classes
here are frozen dataclasses, so that they compare by value and can be pickled; a function of your
own serves as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from fastmt.arguments import check_at_least, check_between, check_finite

Schedule = Callable[[int], float]

__all__ = [
    "Constant",
    "CosineRampDown",
    "LinearRampUp",
    "OnDevice",
    "Schedule",
    "SigmoidRampUp",
    "UncertaintyThreshold",
    "as_schedule",
]


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __post_init__(self) -> None:
        check_finite("value", self.value)

    def __call__(self, step: int) -> float:
        return float(self.value)


@dataclass(frozen=True)
class SigmoidRampUp:
    """`value * exp(-5 (1 - t/length)^2)` up to step `length`, then `value`.

    Starts at `value * exp(-5)`, not at zero; `length=0` gives `value` at once.

    Source: Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017.
    """

    value: float
    length: int

    def __post_init__(self) -> None:
        check_finite("value", self.value)
        _check_length(self.length)

    def __call__(self, step: int) -> float:
        return self.value * _sigmoid_ramp(_progress(step, self.length))


@dataclass(frozen=True)
class LinearRampUp:
    """`value * t/length` up to step `length`, then `value`; `length=0` gives `value` at once."""

    value: float
    length: int

    def __post_init__(self) -> None:
        check_finite("value", self.value)
        _check_length(self.length)

    def __call__(self, step: int) -> float:
        return self.value * _progress(step, self.length)


@dataclass(frozen=True)
class CosineRampDown:
    """`value * (1 + cos(pi t/length)) / 2` up to step `length`, then 0; `length=0` gives 0 at once.

    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR
    2017.
    """

    value: float
    length: int

    def __post_init__(self) -> None:
        check_finite("value", self.value)
        _check_length(self.length)

    def __call__(self, step: int) -> float:
        return self.value * 0.5 * (1.0 + math.cos(math.pi * _progress(step, self.length)))


@dataclass(frozen=True)
class UncertaintyThreshold:
    """Threshold on the score `1 - H(q)/ln C` that lets ever more uncertain pixels in.

    The rule `H(q) < (b + (1-b) r(t)) ln C` with `r(t) = exp(-5 (1 - t/length)^2)` is, for that
    score, `score > (1-b)(1 - r(t))`: this schedule returns `(1-b)(1 - r(t))`, to be used with the
    confidence "entropy" and a strict comparison. It falls from `(1-b)(1 - exp(-5))` at step 0 to 0
    at step `length`.

    Source: Yu et al., "Uncertainty-aware Self-ensembling Model", MICCAI 2019, with b = 0.75.
    """

    length: int
    base: float = 0.75

    def __post_init__(self) -> None:
        _check_length(self.length)
        check_between("base", self.base, 0, 1)

    def __call__(self, step: int) -> float:
        return (1.0 - self.base) * (1.0 - _sigmoid_ramp(_progress(step, self.length)))


class OnDevice:
    """Scheduled numbers in tensors of a device, one a name: filled, never read back.

    A CUDA graph that was captured with them goes on by the schedule, as its replays read what the
    tensors hold by then; to fill one does not wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: dict[str, Tensor] = {}

    def fill(self, name: str, value: float | Tensor) -> Tensor:
        """The tensor of `name`, the same one each time, holding `value`: 0-dim, or of its shape."""
        shape = value.shape if isinstance(value, Tensor) else ()
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != shape:
            tensor = torch.empty(shape, dtype=torch.float32, device=self.device)
            self._tensors[name] = tensor
        if isinstance(value, Tensor):
            return tensor.copy_(value, non_blocking=True)
        return tensor.fill_(value)


def as_schedule(value: float | Schedule, name: str = "value") -> Schedule:
    """Return a callable unchanged and a number as `Constant`; anything else is a TypeError.

    name: of the argument that `value` came as, for the error.
    """
    if callable(value):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        kind = type(value).__name__
        raise TypeError(f"{name}: got {kind}, expected a number or a callable step -> float")
    check_finite(name, value)
    return Constant(float(value))


def _sigmoid_ramp(progress: float) -> float:
    return math.exp(-5.0 * (1.0 - progress) ** 2)


def _progress(step: int, length: int) -> float:
    """The fraction of the ramp that lies behind, in [0, 1]."""
    check_at_least("step", step, 0)
    return 1.0 if step >= length else float(step / length)


def _check_length(length: int) -> None:
    check_finite("length", length)
    check_at_least("length", length, 0)
