"""How far a kernel may be from the float64 reference, for each dtype of the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """The arithmetic is float32; only what is stored in half precision is rounded to it."""

    loss: float  # relative to the loss, or to LOSS_FLOOR where that is larger
    gradient: float  # relative to the largest gradient
    score: float  # absolute, of scores in [0, 1]
    average: float  # of a moving average, relative to the largest value


LOSS_FLOOR = 0.1  # nats: near agreement a divergence is a difference of much larger terms
ROUNDING = 1e-6  # of a gradient of weight 1: near agreement it is a difference of probabilities

TOLERANCES = {
    torch.float32: Tolerance(loss=1e-5, gradient=1e-5, score=5e-6, average=1e-6),
    torch.bfloat16: Tolerance(loss=1e-5, gradient=8e-3, score=5e-6, average=8e-3),
    torch.float16: Tolerance(loss=1e-5, gradient=1e-3, score=5e-6, average=1e-3),
    torch.float64: Tolerance(loss=1e-12, gradient=1e-12, score=1e-12, average=1e-12),
}


def assert_loss_close(value: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    value, expected = value.double(), expected.double()
    allowed = TOLERANCES[dtype].loss * max(expected.abs().item(), LOSS_FLOOR)
    assert (value - expected).abs().item() <= allowed, f"loss {value}, expected {expected}"


def assert_gradient_close(
    gradient: Tensor, expected: Tensor, dtype: torch.dtype, unit: float = 0.0
) -> None:
    """`unit` is the largest weight of a pixel, divided by the denominator of the loss."""
    assert gradient.shape == expected.shape
    if not expected.numel():
        return
    largest = expected.abs().max().item()
    # What is stored in float16 cannot be nearer than half its smallest subnormal number.
    subnormal = 6e-8 if dtype == torch.float16 else 0
    allowed = TOLERANCES[dtype].gradient * largest + ROUNDING * unit + subnormal
    error = (gradient.double() - expected).abs().max().item()
    assert error <= allowed, f"gradient off by {error}, largest {largest}, allowed {allowed}"


def assert_average_close(average: Tensor, expected: Tensor) -> None:
    assert average.shape == expected.shape
    if not expected.numel():
        return
    allowed = TOLERANCES[average.dtype].average * expected.abs().max().item()
    error = (average.double() - expected).abs().max().item()
    assert error <= allowed, f"average off by {error}, allowed {allowed}"
