"""The moving average of a network's parameters against the ways PyTorch and others offer.

`kernel` is the launch alone, over a table of addresses that is never checked: what EMATeacher's
update() takes beyond it is matching, checking and the decay, and the buffers of a tree of modules.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastmt
from benchmarks import harness, inputs, models
from benchmarks.harness import Case, Work
from benchmarks.networks import ResNet50
from benchmarks.shapes import (
    MANY_SMALL,
    resnet50_parameters,
    segformer_b5_parameters,
    unet_parameters,
    vit_large_parameters,
)
from fastmt import cpp_backend, reference
from fastmt.ema_table import Entry, Table

try:
    from ema_pytorch import EMA
except ImportError:
    EMA = None

DECAY = 0.999
GROUP, TEACHER, KERNEL = "EMA", "EMATeacher", "kernel"
LARGE_BYTES = 512 << 20  # from here on two runs of the kernel differ by more than the overhead
Student = tuple[tuple[int, ...], ...] | Callable[[], nn.Module]  # shapes, or what makes one


@torch.no_grad()
def loop(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> None:
    for average, value in zip(teacher, student, strict=True):
        average.mul_(DECAY).add_(value, alpha=1 - DECAY)


@torch.no_grad()
def foreach_lerp(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> None:
    torch._foreach_lerp_(teacher, student, 1 - DECAY)


@torch.no_grad()
def foreach_mul_add(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> None:
    torch._foreach_mul_(teacher, DECAY)
    torch._foreach_add_(teacher, student, alpha=1 - DECAY)


fused = partial(fastmt.ema_update_, decay=DECAY)

FUNCTIONS = {
    "loop": loop,
    "_foreach_lerp_": foreach_lerp,
    "_foreach_mul_, _foreach_add_": foreach_mul_add,
    harness.FUSED: fused,
}


def cases(which: str) -> list[Case]:
    """The comparisons of the set "tiny", "quick", or "full" and "ema", which are the same here."""
    if which == "tiny":
        return [_case("5 tensors of 7x3", ((7, 3),) * 5)]
    half = torch.bfloat16
    return [
        _case("U-Net, 31 M parameters in 64 tensors", unet_parameters()),
        _case("1000 tensors of 64x16", MANY_SMALL),
        _case("161 tensors of 8, as many as ResNet-50 has", ((8,),) * 161),
        _case("ResNet-50, 26 M parameters in 161 tensors", resnet50_parameters()),
        _case("ResNet-50, 26 M parameters in 161 tensors", resnet50_parameters(), half),
        _case("ResNet-50's modules and buffers, an eighth as wide", partial(ResNet50, 8, 10)),
        _case("ResNet-50's modules and buffers", ResNet50),
        _case("SegFormer-B5, 85 M parameters in 1065 tensors", segformer_b5_parameters()),
        *(
            _case("ViT-L, 304 M parameters in 296 tensors", vit_large_parameters(), dtype)
            for dtype in (torch.float32, half)
            if which in ("full", "ema")
        ),
    ]


def _case(name: str, student: Student, dtype: torch.dtype = torch.float32) -> Case:
    suffix = "float32" if dtype == torch.float32 else "bfloat16 student of a float32 teacher"
    return Case(f"{name}, {suffix}", GROUP, partial(_build, student, dtype))


def _build(student: Student, dtype: torch.dtype, device: torch.device, compiled: bool) -> Work:
    if not callable(student):
        student = partial(nn.ParameterList, inputs.parameters(student, device=device, seed=0))
    student = student().to(device, dtype)
    shapes = [parameter.shape for parameter in student.parameters()]
    start = inputs.parameters(shapes, device=device, seed=1)
    teacher = [tensor.clone() for tensor in start]
    values = [parameter.detach() for parameter in student.parameters()]
    ours = fastmt.EMATeacher(student, DECAY, warmup=None)
    updates = {
        name: (partial(function, teacher, values), teacher)
        for name, function in FUNCTIONS.items()
        if dtype == torch.float32 or function is not foreach_lerp  # which takes one dtype
    }
    updates[TEACHER] = (partial(ours.update, student=student), list(ours.parameters()))
    if cpp_backend.missing() is None and device.type == "cpu":
        own = list(ours.parameters())
        table = Table(list(map(Entry, own, values)), device)
        decay = torch.tensor(DECAY, dtype=torch.float64)
        updates[KERNEL] = (partial(table.update, torch.ops.fastmt, decay), own)
    if dtype == torch.float32:  # the others' averages have the student's dtype
        updates |= _others(student)

    @torch.no_grad()
    def reset() -> None:
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


def _others(student: nn.Module) -> dict[str, tuple[Callable[[], None], list[Tensor]]]:
    swa = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=False)
    swa.update_parameters(student)  # its first update is a plain copy
    found = {"AveragedModel": (partial(swa.update_parameters, student), list(swa.parameters()))}
    if EMA is None:
        return found
    ema = EMA(
        student,
        beta=DECAY,
        min_value=DECAY,  # no warm-up
        update_after_step=0,
        update_every=1,
        include_online_model=False,
    )

    def update(use_foreach: bool) -> None:
        ema.use_foreach = use_foreach
        ema.update()

    for _ in range(3):  # plain copies, and a decay of 0
        update(False)
    averages = list(ema.ema_model.parameters())
    found["ema-pytorch"] = (partial(update, False), averages)
    return found | {"ema-pytorch, foreach": (partial(update, True), averages)}


def overhead(case: dict) -> list[float] | None:
    """Quartiles of the seconds that EMATeacher.update() took beyond the kernel, by round."""
    if not {TEACHER, KERNEL} <= case["variants"].keys() or case["bytes"] > LARGE_BYTES:
        return None
    rounds = (case["variants"][name]["samples_s"] for name in (TEACHER, KERNEL))
    beyond = [ours - kernel for ours, kernel in zip(*rounds, strict=True)]
    return statistics.quantiles(beyond, n=4, method="inclusive") if beyond[1:] else beyond * 3


def quicker(case: dict) -> dict[str, dict[str, float]]:
    """By the name of our calls the other ways that take less time, as a part of theirs."""
    ratios = {harness.FUSED: 1.0, **case["ratios"]}
    others = [name for name in ratios if name not in (harness.FUSED, TEACHER, KERNEL)]
    found = {
        told: {n: ratios[n] / ratios[ours] for n in others if ratios[n] < ratios[ours]}
        for told, ours in (("ema_update_", harness.FUSED), ("EMATeacher.update", TEACHER))
        if ours in ratios
    }
    return {told: ways for told, ways in found.items() if ways}


def _updated(update: Callable[[], None], teacher: list[Tensor]) -> list[Tensor]:
    update()
    return teacher


def _expected(start: Sequence[Tensor], student: Sequence[Tensor]) -> list[Tensor]:
    teacher = [tensor.double() for tensor in start]
    for average, value in zip(teacher, student, strict=True):
        reference.ema_update_([average], [value.double()], DECAY)
    return teacher


VARIANTS = [*FUNCTIONS, TEACHER, KERNEL, "AveragedModel", "ema-pytorch", "ema-pytorch, foreach"]


@harness.parametrize("variant", VARIANTS)
@harness.parametrize("case", cases("quick"), ids=lambda case: case.name)
def test_ema_update(benchmark, case: Case, variant: str) -> None:
    harness.benchmark_variant(benchmark, case, variant)
