"""What is timed on a GPU: every backend that serves a call, eager PyTorch and torch.compile.

Each call takes the next of several equal sets of tensors, together larger than the second-level
cache, so that every call finds its inputs in memory. A moving average is always of the same
tensors, as in training; the other ways to make it: `benchmarks.report --cases ema --device cuda`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import fastmt
from benchmarks import (
    bench_confidence,
    bench_consistency,
    bench_cross_entropy,
    bench_ema,
    harness,
    inputs,
    models,
)
from benchmarks.harness import Case, Work
from benchmarks.shapes import (
    MANY_SMALL,
    Shape,
    resnet50_parameters,
    segformer_b5_parameters,
    vit_large_parameters,
)
from fastmt import backends, reference
from fastmt.backends import Choice

LARGE = Shape(8, 19, (1024, 1024))
SMALL = Shape(1, 19, (64, 64))
VOLUME = Shape(2, 14, (96, 96, 96))
TINY, TINY_VOLUME = Shape(2, 5, (16, 24)), Shape(2, 5, (8, 16, 24))
THRESHOLD = bench_consistency.THRESHOLD
_MAX_SETS = 512


@dataclass(frozen=True)
class GpuWork(Work):
    """A comparison with the choice of each backend, and what is left out with its reason."""

    choices: dict[str, Choice] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def cases(which: str = "real") -> list[Case]:
    """The comparisons, or ("tiny") the same at sizes for a test on a CPU."""
    tiny = which == "tiny"
    large, small, volume = (TINY, TINY, TINY_VOLUME) if tiny else (LARGE, SMALL, VOLUME)
    single, half = torch.float32, torch.bfloat16
    losses = [
        _loss("dense", "consistency", large, half, compiled=True),
        _loss("dense", "consistency", large, single),
        _loss("dense", "confidence", large, half),
        _loss("dense", "confidence", large, single),
        _loss("dense", "cross-entropy", large, half, labels=torch.uint8),
        _loss("up-sampled", "consistency", large, single, 8, compiled=True),
        _loss("up-sampled", "consistency", large, single, 4),
        _loss("up-sampled", "confidence", large, single, 8, compiled=True),
        _loss("up-sampled", "cross-entropy", large, single, 4, compiled=True),
        _loss("small", "consistency", small, single, compiled=True),
        _loss("small", "confidence", small, single, compiled=True),
        _loss("small", "cross-entropy", small, single, compiled=True),
        _loss("volumes", "consistency", volume, single, 4),
    ]
    return [*losses, *_averages(tiny)]


def _loss(
    group: str,
    operation: str,
    shape: Shape,
    dtype: torch.dtype,
    stride: int = 1,
    compiled: bool = False,
    **options: torch.dtype,
) -> Case:
    """A loss or score; few are `compiled`, each of which takes as long as many that are not."""
    builders = {
        "consistency": _consistency,
        "confidence": _confidence,
        "cross-entropy": _cross_entropy,
    }
    name = f"{operation} {shape} {_short(dtype)}" + (f" from 1/{stride}" if stride > 1 else "")
    name += "".join(f", {_short(value)} {what}" for what, value in options.items())
    build = partial(builders[operation], shape, dtype, stride, **options)
    return Case(name, group, build, compiled=compiled)


def _averages(tiny: bool) -> list[Case]:
    found = []
    large = ((7, 3),) * 5 if tiny else vit_large_parameters()
    averages = [(large, torch.float32), (large, torch.bfloat16)]
    if not tiny:
        smaller = (segformer_b5_parameters(), resnet50_parameters(), MANY_SMALL)
        averages += [(parameters, torch.float32) for parameters in smaller]
    for parameters, dtype in averages:
        count = f"{sum(map(math.prod, parameters)) / 1e6:.0f} M in {len(parameters)} tensors"
        name = f"EMA of {count}, {_short(dtype)} student"
        found.append(Case(name, "moving average", partial(_average, parameters, dtype)))
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sets_for(nbytes: int, cache: int) -> int:
    """How many sets of `nbytes` outweigh the cache twice, so that none is still in it."""
    return max(1, min(_MAX_SETS, -(-2 * cache // max(nbytes, 1))))


def cache_bytes(device: torch.device) -> int:
    """Size of the second-level cache."""
    if device.type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)


def _sets(tensors: Sequence[Tensor], device: torch.device) -> list[list[Tensor]]:
    """Equal copies of the tensors, the tensors themselves first."""
    count = sets_for(sum(t.nbytes for t in tensors), cache_bytes(device))
    copies = (
        [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
        for _ in range(count - 1)
    )
    return [list(tensors), *copies]


def _compared(
    function: Callable,
    eager: Callable,
    call: Callable[..., Sequence[Tensor]],
    sets: list[list[Tensor]],
    compiled: bool,
    **work: object,
) -> GpuWork:
    """The variants of `call(f, *tensors)`: f is fastmt's `function` by each backend, or `eager`."""
    choices, auto = {}, fastmt.explain(function, *sets[0])
    for name in backends.KERNELS:
        with fastmt.backend(name):
            choices[name] = fastmt.explain(function, *sets[0])
    variants = {"eager": eager, **harness.compiled(eager, compiled)}
    served = {name: c for name, c in choices.items() if c.backend != "eager"}
    # What auto takes is called as users call it: to enter a context takes time too.
    variants |= {
        name: function if name == auto.backend else partial(_by_backend, name, function)
        for name in served
    }
    return GpuWork(
        variants={name: _turning(partial(call, f), sets) for name, f in variants.items()},
        choice=auto,
        choices=served,
        left_out={name: c.reason for name, c in choices.items() if name not in served},
        **work,
    )


def _turning(call: Callable, sets: list[list[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    turns = itertools.cycle(sets)
    return lambda: call(*next(turns))


def _by_backend(name: str, function: Callable, *tensors: Tensor) -> object:
    with fastmt.backend(name, strict=True):
        return function(*tensors)


def _gradient(function: Callable, logits: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient; the gradient is not left behind in one of many sets."""
    loss = function(logits, *others)
    loss.backward()
    gradient, logits.grad = logits.grad, None
    return loss.detach(), gradient


def _consistency(
    shape: Shape, dtype: torch.dtype, stride: int, device: torch.device, compiled: bool
) -> GpuWork:
    low, size = shape.lowered(stride), shape.spatial if stride > 1 else None
    student = inputs.logits(low, dtype=dtype, device=device, seed=0).requires_grad_()
    teacher = inputs.logits(low, dtype=dtype, device=device, seed=1, threshold=THRESHOLD)
    threshold = THRESHOLD
    if size:  # one image again and again: few scores, with a gap between them that rounding spares
        teacher = teacher[:1].expand_as(teacher).contiguous()
        threshold = inputs.clear_threshold(teacher[:1], size, near=THRESHOLD)
    options = {"threshold": threshold, "size": size}
    eager = partial(bench_consistency.EAGER["mse"], threshold=threshold)
    return _compared(
        partial(fastmt.consistency_loss, **options),
        partial(bench_consistency.at_size, eager, size) if size else eager,
        _gradient,
        _sets([student, teacher], device),
        compiled,
        expected=partial(bench_consistency.expected_of, student, teacher, options),
        tolerance=harness.TOLERANCE[dtype],
        bytes=models.consistency_loss(student, [teacher]),
    )


def _confidence(
    shape: Shape, dtype: torch.dtype, stride: int, device: torch.device, compiled: bool
) -> GpuWork:
    low, size = shape.lowered(stride), shape.spatial if stride > 1 else None
    logits = inputs.logits(low, dtype=dtype, device=device, seed=0, in_steps=stride > 1)
    eager = bench_confidence.eager
    return _compared(
        partial(fastmt.softmax_confidence, size=size),
        partial(bench_confidence.at_size, size) if size else eager,
        lambda function, values: function(values),
        _sets([logits], device),
        compiled,
        expected=partial(bench_confidence.expected_of, logits, size),
        tolerance=harness.TOLERANCE[dtype],
        bytes=models.softmax_confidence([logits], size),
    )


def _cross_entropy(
    shape: Shape,
    dtype: torch.dtype,
    stride: int,
    device: torch.device,
    compiled: bool,
    labels: torch.dtype = torch.int64,
) -> GpuWork:
    low = shape.lowered(stride)
    logits = inputs.logits(low, dtype=dtype, device=device, seed=0).requires_grad_()
    targets = inputs.labels(shape, device=device, seed=1).to(labels)
    return _compared(
        fastmt.cross_entropy,
        bench_cross_entropy.eager if labels == torch.int64 else _eager_cross_entropy,
        _gradient,
        _sets([logits, targets], device),
        compiled,
        expected=partial(bench_cross_entropy.expected_of, logits, targets),
        tolerance=harness.TOLERANCE[dtype],
        bytes=models.cross_entropy(logits, targets),
    )


def _eager_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """In float32, as under autocast, and with labels of the only dtype PyTorch takes for images."""
    return bench_cross_entropy.eager(logits.float(), labels.long())


def _average(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: torch.device, compiled: bool
) -> GpuWork:
    student = [t.to(dtype) for t in inputs.parameters(shapes, device=device, seed=0)]
    start = inputs.parameters(shapes, device=device, seed=1)
    teacher = [tensor.clone() for tensor in start]

    def expected() -> list[Tensor]:
        averages = [tensor.double() for tensor in start]
        reference.ema_update_(averages, [s.double() for s in student], bench_ema.DECAY)
        return averages

    decay = torch.tensor(bench_ema.DECAY, dtype=torch.float64, device=device)  # as EMATeacher's
    return _compared(
        partial(fastmt.ema_update_, decay=decay),
        bench_ema.foreach_lerp if dtype == torch.float32 else bench_ema.loop,
        _updated,
        [[teacher, student]],
        compiled,
        expected=expected,
        tolerance=harness.TOLERANCE[torch.float32],
        bytes=models.ema_update_(teacher, student),
        reset=partial(torch._foreach_copy_, teacher, start),
    )


def _updated(function: Callable, teacher: list[Tensor], student: list[Tensor]) -> list[Tensor]:
    function(teacher, student)
    return teacher
