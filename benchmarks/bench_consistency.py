"""Consistency loss, forward and backward: fused against what training scripts write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmt
from benchmarks import harness, inputs, models
from benchmarks.harness import Case, Work
from benchmarks.shapes import (
    CROSSOVER,
    HEADLINE,
    LARGE,
    TINY,
    TINY_VOLUME,
    UPSAMPLED,
    UPSAMPLED_VOLUMES,
    Shape,
)
from fastmt import reference

THRESHOLD = 0.7


def eager_mse(student: Tensor, teacher: Tensor, threshold: float) -> Tensor:
    p = student.softmax(1, dtype=torch.float32)
    with torch.no_grad():
        q = teacher.softmax(1, dtype=torch.float32)
        mask = q.max(1).values >= threshold
    return (mask * (p - q).square().sum(1)).mean()


def eager_ce(student: Tensor, teacher: Tensor, threshold: float) -> Tensor:
    with torch.no_grad():
        score, label = teacher.softmax(1, dtype=torch.float32).max(1)
    return ((score >= threshold) * F.cross_entropy(student.float(), label, reduction="none")).mean()


def eager_kl(student: Tensor, teacher: Tensor, threshold: float) -> Tensor:
    log_p = student.log_softmax(1, dtype=torch.float32)
    with torch.no_grad():
        q = teacher.softmax(1, dtype=torch.float32)
        mask = q.max(1).values >= threshold
    return (mask * F.kl_div(log_p, q, reduction="none").sum(1)).mean()


EAGER = {"mse": eager_mse, "ce": eager_ce, "kl": eager_kl}


def cases(which: str) -> list[Case]:
    """The comparisons of the set "tiny", "quick" or "full"."""
    if which == "tiny":
        half = _case(TINY, "kl", torch.bfloat16)
        upsampled = [_case(shape, stride=2) for shape in (TINY, TINY_VOLUME)]
        return [_case(TINY), half, *upsampled, _crossover(TINY)]
    variants = [
        _case(HEADLINE, "mse", torch.bfloat16, compiled=which == "full"),
        _case(HEADLINE, "mse", layout="channels_last", compiled=which == "full"),
    ]
    chosen = [*(_case(HEADLINE, loss, compiled=True) for loss in EAGER), *variants]
    if which == "full":
        chosen += [_case(shape) for shape in LARGE]
    chosen += [
        _case(shape, loss, stride=stride, compiled=True)
        for shape, stride in UPSAMPLED
        for loss in ("mse", "ce")
    ]
    chosen += [_case(shape, stride=stride, compiled=True) for shape, stride in UPSAMPLED_VOLUMES]
    return chosen + [_crossover(shape) for shape in CROSSOVER]


def _case(
    shape: Shape,
    loss: str = "mse",
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    stride: int = 1,
    compiled: bool = False,
) -> Case:
    name = f"{loss} {shape} {str(dtype).removeprefix('torch.')}"
    name += "" if layout == "contiguous" else f" {layout}"
    name += "" if stride == 1 else f" from 1/{stride}"
    group = "consistency loss" if stride == 1 else "consistency loss, up-sampled inside"
    return Case(name, group, partial(_build, shape, loss, dtype, layout, stride), compiled)


def upsampled(shape: Shape, stride: int) -> Case:
    """The comparison of benchmarks.scaling: one image size of several."""
    return _case(shape, stride=stride, compiled=True)


def _crossover(shape: Shape) -> Case:
    build = partial(_build, shape, "mse", torch.float32, "contiguous", 1)
    return Case(f"mse {shape} float32 small", "small images", build, forced=True)


def _build(
    shape: Shape,
    loss: str,
    dtype: torch.dtype,
    layout: str,
    stride: int,
    device: torch.device,
    compiled: bool,
) -> Work:
    low = shape.lowered(stride)
    size = shape.spatial if stride > 1 else None
    make = partial(inputs.logits, low, dtype=dtype, layout=layout, device=device)
    student = make(seed=0).requires_grad_()
    teacher = make(seed=1, threshold=THRESHOLD)
    threshold = inputs.clear_threshold(teacher, size, near=THRESHOLD) if size else THRESHOLD
    options = {"loss": loss, "threshold": threshold, "size": size}
    eager = partial(EAGER[loss], threshold=threshold)
    if size:
        eager = partial(at_size, eager, size)
    fused = partial(fastmt.consistency_loss, **options)
    functions = {"eager": eager, **harness.compiled(eager, compiled), harness.FUSED: fused}
    _, stats = fastmt.consistency_loss(student.detach(), teacher, return_stats=True, **options)
    return Work(
        variants={n: partial(with_gradient, f, student, teacher) for n, f in functions.items()},
        expected=partial(expected_of, student, teacher, options),
        tolerance=harness.TOLERANCE[dtype],
        bytes=models.consistency_loss(student, [teacher]),
        choice=fastmt.explain(fastmt.consistency_loss, student, teacher, **options),
        leaves=(student,),
        facts={"threshold": threshold, "selected": float(stats.selected)},
    )


def at_size(function: Callable, size: Sequence[int], student: Tensor, teacher: Tensor) -> Tensor:
    return function(*(reference.upsample(logits, size, False) for logits in (student, teacher)))


def with_gradient(function: Callable, logits: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    loss = function(logits, other)
    loss.backward()
    return loss.detach(), logits.grad


def expected_of(student: Tensor, teacher: Tensor, options: dict[str, object]) -> list[Tensor]:
    """Loss and gradient of the reference in float64, one image at a time to save memory."""
    total, gradients = 0.0, []
    for image, target in zip(student.detach().split(1), teacher.split(1), strict=True):
        leaf = image.double().requires_grad_()
        loss = reference.consistency_loss(leaf, target.double(), **options) / len(student)
        loss.backward()
        total += loss.detach()
        gradients.append(leaf.grad.float())
    return [total, torch.cat(gradients)]


@harness.parametrize("variant", ["eager", harness.FUSED])
@harness.parametrize("case", cases("quick"), ids=lambda case: case.name)
def test_consistency_loss(benchmark, case: Case, variant: str) -> None:
    harness.benchmark_variant(benchmark, case, variant)
