"""The moving average of a network's parameters against the ways PyTorch offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastmt
from benchmarks import harness, inputs, models
from benchmarks.harness import Case, Work
from benchmarks.shapes import (
    MANY_SMALL,
    resnet50_parameters,
    unet_parameters,
    vit_large_parameters,
)
from fastmt import reference

DECAY = 0.999


@torch.no_grad()
def loop(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> None:
    for average, value in zip(teacher, student, strict=True):
        average.mul_(DECAY).add_(value, alpha=1 - DECAY)


@torch.no_grad()
def foreach_lerp(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> None:
    torch._foreach_lerp_(teacher, student, 1 - DECAY)


def fused(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> None:
    fastmt.ema_update_(teacher, student, DECAY)


FUNCTIONS = {"loop": loop, "_foreach_lerp_": foreach_lerp, harness.FUSED: fused}


def cases(which: str) -> list[Case]:
    """The comparisons of the set "tiny", "quick" or "full"."""
    if which == "tiny":
        return [_case("5 tensors of 7x3", ((7, 3),) * 5)]
    return [
        _case("U-Net, 31 M parameters in 64 tensors", unet_parameters()),
        _case("1000 tensors of 64x16", MANY_SMALL),
        _case("ResNet-50, 26 M parameters in 161 tensors", resnet50_parameters()),
        *(
            [_case("ViT-L, 304 M parameters in 296 tensors", vit_large_parameters())]
            * (which == "full")
        ),
    ]


def _case(name: str, shapes: tuple[tuple[int, ...], ...]) -> Case:
    return Case(f"{name}, float32", "EMA", partial(_build, shapes))


def _build(shapes: tuple[tuple[int, ...], ...], device: torch.device, compiled: bool) -> Work:
    student = nn.ParameterList(inputs.parameters(shapes, device=device, seed=0))
    start = inputs.parameters(shapes, device=device, seed=1)
    teacher = [tensor.clone() for tensor in start]
    values = [parameter.detach() for parameter in student]
    swa = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=False)
    ours = fastmt.EMATeacher(student, DECAY, warmup=None)
    updates = {
        name: (partial(function, teacher, values), teacher) for name, function in FUNCTIONS.items()
    }
    updates["AveragedModel"] = (partial(swa.update_parameters, student), list(swa.parameters()))
    updates["EMATeacher"] = (ours.update, list(ours.parameters()))

    @torch.no_grad()
    def reset() -> None:
        swa.n_averaged.fill_(1)  # its first update would be a plain copy
        for _, tensors in updates.values():
            torch._foreach_copy_(tensors, start)

    return Work(
        variants={name: partial(_updated, *update) for name, update in updates.items()},
        expected=partial(_expected, start, values),
        tolerance=harness.TOLERANCE[torch.float32],
        bytes=models.ema_update_(teacher, values),
        choice=fastmt.explain(fastmt.ema_update_, teacher, values, DECAY),
        reset=reset,
    )


def _updated(update: Callable[[], None], teacher: list[Tensor]) -> list[Tensor]:
    update()
    return teacher


def _expected(start: Sequence[Tensor], student: Sequence[Tensor]) -> list[Tensor]:
    teacher = [tensor.double() for tensor in start]
    reference.ema_update_(teacher, [value.double() for value in student], DECAY)
    return teacher


@pytest.mark.parametrize("variant", [*FUNCTIONS, "AveragedModel", "EMATeacher"])
@pytest.mark.parametrize("case", cases("quick"), ids=lambda case: case.name)
def test_ema_update(benchmark, case: Case, variant: str) -> None:
    harness.benchmark_variant(benchmark, case, variant)
