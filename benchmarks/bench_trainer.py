"""The trainer's own work: what a step does besides the networks and the optimiser.

Own work is style, noise, jitter, losses with their backward pass down to the student's logits, EMA,
and bookkeeping. The networks' forward, the backward pass through the student and the optimiser are
not. All is timed inside real steps (see stopwatch.py), so that the parts add up to the step; steps
with the kernels and steps in plain PyTorch take turns, in pairs of which the second is timed.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fastmt
from benchmarks import harness, inputs, machine, stopwatch
from benchmarks.shapes import Shape
from fastmt.networks import UNet
from fastmt.trainer import MeanTeacher

BACKENDS = {harness.FUSED: "auto", "eager": "eager"}


class Setting(NamedTuple):
    """Source and target images in a step, their side, classes and the network's width."""

    batch: int
    side: int
    classes: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch}+{self.batch} images of {self.side}x{self.side}, U-Net {self.width}"


STEP = Setting(batch=6, side=256, classes=19, width=32)
TINY_STEP = Setting(batch=2, side=64, classes=3, width=2)


def trainer(setting: Setting, device: torch.device) -> MeanTeacher:
    torch.manual_seed(0)
    student = UNet(setting.classes, width=setting.width).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    return MeanTeacher(student, optimizer, jitter={}, threshold=0.0)  # all pixels teach


def batch(setting: Setting, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (setting.batch, 3, setting.side, setting.side)
    source, target = (torch.rand(size, generator=generator).to(device) for _ in range(2))
    shape = Shape(setting.batch, setting.classes, (setting.side, setting.side))
    return source, inputs.labels(shape, device=device, seed=0), target


def measure(setting: Setting, device: torch.device, *, steps: int = 15) -> dict[str, object]:
    """Median seconds of each part of a step, with the kernels and in plain PyTorch."""
    images = batch(setting, device)
    loss = first_loss(setting, device)
    trainers = {name: trainer(setting, device) for name in BACKENDS}
    watches = {name: stopwatch.attach(each) for name, each in trainers.items()}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in BACKENDS}
    for turn in range(steps + 1):
        for name, backend in BACKENDS.items():
            with fastmt.backend(backend):
                # The first step finds memory as the other variant left it, and is not timed.
                first = trainers[name].step(*images)
                watches[name].seconds.clear()
                trainers[name].step(*images)
            if turn == 0:
                _check_loss(f"timed {name}", first.loss, loss)
            else:
                parts[name].append(dict(watches[name].seconds))
    return {"name": str(setting), "steps": {name: _summary(each) for name, each in parts.items()}}


def first_loss(setting: Setting, device: torch.device) -> Tensor:
    """The loss of the first step in plain PyTorch; WrongResult where the kernels give another."""
    losses = {}
    for name, backend in BACKENDS.items():
        with fastmt.backend(backend):
            losses[name] = trainer(setting, device).step(*batch(setting, device)).loss
    _check_loss(harness.FUSED, losses[harness.FUSED], losses["eager"])
    return losses["eager"]


def _check_loss(name: str, actual: Tensor, expected: Tensor) -> None:
    if not torch.isclose(actual, expected, rtol=1e-4, atol=0):
        raise harness.WrongResult(
            f"{name}: the first step's loss is {float(actual):g}, expected {float(expected):g}"
        )


def _summary(parts: list[dict[str, float]]) -> dict[str, object]:
    own = [_own(each) for each in parts]
    steps = [sum(each.values()) for each in parts]
    return {
        "step_s": statistics.median(steps),
        "own_s": statistics.median(own),
        "own_share": statistics.median(o / s for o, s in zip(own, steps, strict=True)),
        "parts_s": {name: statistics.median(each[name] for each in parts) for name in parts[0]},
    }


def _own(parts: dict[str, float]) -> float:
    return sum(seconds for name, seconds in parts.items() if name not in stopwatch.NETWORKS)


@harness.parametrize("variant", BACKENDS)
def test_step(benchmark, variant: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first_loss(STEP, device)
    step = partial(trainer(STEP, device).step, *batch(STEP, device))

    def timed() -> None:
        step()
        machine.synchronize(device)

    benchmark.group = str(STEP)
    with fastmt.backend(BACKENDS[variant]):
        benchmark(timed)
