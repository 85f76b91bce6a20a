"""Decay schedules of a moving average: update t = 0, 1, ... -> a_t in [0, 1].

After update t the average is a_t * average + (1 - a_t) * student. Frozen dataclasses, so that they
compare by value and can be pickled; any function of your own serves as well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from fastmt import arguments

Decay = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """The same decay at every update."""

    decay: float

    def __call__(self, step: int) -> float:
        return self.decay


@dataclass(frozen=True)
class Reciprocal:
    """min(1 - 1/(t+1), decay): the plain mean of the first students, the first one whole.

    Source: Tarvainen and Valpola 2017, their code.
    """

    decay: float

    def __call__(self, step: int) -> float:
        return min(1 - 1 / (step + 1), self.decay)


@dataclass(frozen=True)
class Tenths:
    """min((1+t)/(10+t), decay): starts at 0.1.

    Source: TensorFlow's ExponentialMovingAverage with `num_updates`.
    """

    decay: float

    def __call__(self, step: int) -> float:
        return min((1 + step) / (10 + step), self.decay)


@dataclass(frozen=True)
class InversePower:
    """min(1 - (1 + t/inv_gamma)^-power, decay); 0 at the first update.

    Source: Crowson's k-diffusion, as in timm's ModelEmaV3 and diffusers' EMAModel.
    """

    decay: float
    inv_gamma: float = 1.0
    power: float = 2 / 3

    def __post_init__(self) -> None:
        arguments.check_positive("inv_gamma", self.inv_gamma)
        arguments.check_positive("power", self.power)

    def __call__(self, step: int) -> float:
        return min(1 - (1 + step / self.inv_gamma) ** -self.power, self.decay)


@dataclass(frozen=True)
class PowerFunction:
    """(1 - 1/(t+1))^(gamma+1): a student of time s weighs s^gamma, whatever the run's length.

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models"
    (EDM2), CVPR 2024, equation 127; `fastmt.posthoc` mixes two such tracks afterwards.
    """

    gamma: float

    def __post_init__(self) -> None:
        if not (isinstance(self.gamma, Real) and self.gamma > -1):
            raise ValueError(f"gamma: got {self.gamma!r}, expected a number above -1")

    def __call__(self, step: int) -> float:
        return (1 - 1 / (step + 1)) ** (self.gamma + 1)


@dataclass(frozen=True)
class Cosine:
    """From `decay` up to `end` over `length` updates: end - (end - decay)(1 + cos(pi t/length))/2.

    Source: Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020.
    """

    decay: float
    length: int
    end: float = 1.0

    def __post_init__(self) -> None:
        arguments.check_positive("length", self.length)

    def __call__(self, step: int) -> float:
        progress = min(step / self.length, 1.0)
        return self.end - (self.end - self.decay) * (1 + math.cos(math.pi * progress)) / 2


WARMUPS = {"reciprocal": Reciprocal, "tenths": Tenths, "power": InversePower}


@functools.lru_cache(maxsize=16)
def warmed_up(warmup: str | None, decay: float) -> Decay:
    """The schedule of a decay with one of WARMUPS, or without."""
    return WARMUPS.get(warmup, Constant)(decay)


@functools.lru_cache(maxsize=16)
def warmup_length(warmup: str | None, decay: float) -> int:
    """A number of updates after which the warm-up has ended, less than twice the first such."""
    schedule, length = warmed_up(warmup, decay), 0
    while schedule(length) < decay:
        length = 2 * length + 1
    return length


def half_life_decay(half_life: float, steps: int, images: float | None = None) -> float:
    """The decay with which a weight counts half after `half_life` steps, or images where given.

    Args:
        half_life: in steps, or in images.
        steps: that pass from one averaging update to the next.
        images: of a step.
    """
    arguments.check_positive("half_life", half_life)
    arguments.check_positive("steps", steps)
    if images is not None:
        arguments.check_positive("images_per_step", images)
    decay = 0.5 ** (steps * (1 if images is None else images) / half_life)
    if decay == 1:
        raise ValueError(f"half_life: got {half_life!r}, expected less: its decay rounds to 1")
    return decay
