"""Partial sums of programs added up in a fixed order, and the scalars that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmt.kernels.launch import GIVEN, Launch

ROWS = tl.constexpr(8)  # of partial sums that are added up at once
NORMALIZATIONS = ("all", "valid", "selected", "weight")
BLOCK = 1024
FEW = 4096  # partial sums that one program adds up


class GradientScale:
    """How a gradient is scaled: `inside` the kernel, and by the rest when backward hands it out.

    A gradient takes its denominator, the number of pixels, inside where that is known, which saves
    the backward pass its scaling. In float16 it would drown in the subnormals before the caller's
    loss scale lifts it; there only the pixels of one low-resolution cell are divided out, so that
    their sum stays in range, and the `class_share` that the kernel multiplies by is left out.
    """

    def __init__(self, logits: Tensor, pixels: int, known: bool, class_share: float = 1.0) -> None:
        half = logits.dtype == torch.float16
        self.complete = known and not half
        self.inside = 1 / pixels if self.complete else 1.0
        if half:
            cells = logits.numel() / logits.shape[1]
            self.inside = 1 / (max(pixels / cells, 1.0) * class_share)


def scalars(like: Tensor, count: int) -> tuple[Tensor, ...]:
    first = like.new_empty((), dtype=torch.float32)
    return first, *[torch.empty_like(first) for _ in range(count - 1)]


@triton.jit
def add_up(partials, begin, end, programs, COUNT, BLOCK: tl.constexpr):
    """Float64 sums (ROWS,) over the programs [begin, end) of partials (COUNT, programs)."""
    rows = tl.arange(0, ROWS)
    totals = tl.zeros((ROWS, BLOCK), tl.float64)
    for first in range(begin, end, BLOCK):
        lanes = first + tl.arange(0, BLOCK)
        at = partials + rows[:, None] * programs + lanes[None, :]
        mask = (rows < COUNT)[:, None] & (lanes < end)[None, :]
        totals += tl.load(at, mask=mask, other=0.0).to(tl.float64)
    return tl.sum(totals, 1)


@triton.jit
def fold_kernel(
    partials,
    programs,
    folded,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums of BLOCK programs each, in float64."""
    begin = tl.program_id(0) * BLOCK
    end = tl.minimum(begin + BLOCK, programs)
    totals = add_up(partials, begin, end, programs, COUNT, BLOCK)
    rows = tl.arange(0, ROWS)
    at = folded + rows * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, totals, mask=rows < COUNT)


@triton.jit
def pick(totals, row: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, ROWS) == row, totals, 0.0), 0)


@triton.jit
def ratio(numerator, denominator):
    """numerator / denominator, 0 where there is nothing to divide by; NaN by infinity.

    So the gradient of infinite weights is NaN like their loss.
    """
    empty = denominator == 0
    return tl.where(empty, 0.0, numerator / tl.where(empty, 1.0, denominator) + 0.0 * denominator)


@triton.jit
def consistency_total_kernel(
    partials,
    programs,
    results,
    pixels,
    inside,
    COUNT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RATIO: tl.constexpr,
    COMPLETE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From (loss, weight, score, selected, valid) of each program, the results of the call.

    These are loss, selected, mean_score, scale.
    """
    totals = add_up(partials, 0, programs, programs, COUNT, BLOCK)
    passing = pick(totals, 3)
    valid = pick(totals, 4)
    fraction = ratio(passing, valid)
    factor = fraction if RATIO else fraction * 0 + 1
    if NORMALIZE == "all":
        denominator = valid * 0 + pixels
    elif NORMALIZE == "valid":
        denominator = valid
    elif NORMALIZE == "selected":
        denominator = passing
    else:
        denominator = factor * pick(totals, 1)
    denominator = tl.where(factor == 0, 0.0, denominator)
    value = ratio(factor * pick(totals, 0), denominator)
    outside = ratio(factor, denominator) / inside
    tl.store(results[0], value.to(tl.float32))
    tl.store(results[1], fraction.to(tl.float32))
    tl.store(results[2], ratio(pick(totals, 2), valid).to(tl.float32))
    tl.store(results[3], 1.0 if COMPLETE else outside.to(tl.float32))


@triton.jit
def cross_entropy_total_kernel(
    partials,
    programs,
    results,
    pixels,
    inside,
    COUNT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COMPLETE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From (loss, wrong, weight, valid) of each program, the results of the call.

    These are loss, scale, labels out of range. Such a label makes loss and gradient NaN.
    With two sums, (loss, wrong), the denominator is at `inside`, where denominator.py has left it.
    """
    totals = add_up(partials, 0, programs, programs, COUNT, BLOCK)
    wrong = pick(totals, 1)
    poison = tl.where(wrong > 0, float("nan"), 1.0)
    if COUNT == 2:
        outside = tl.load(inside)
        value = tl.where(outside == 0, 0.0, pick(totals, 0) * outside) * poison
    else:
        valid = pick(totals, 3)
        if NORMALIZE == "all":
            denominator = valid * 0 + pixels
        elif NORMALIZE == "valid":
            denominator = valid
        else:
            denominator = pick(totals, 2)
        value = ratio(pick(totals, 0), denominator) * poison
        outside = ratio(1.0, denominator) / inside
    if COMPLETE:  # but where there is nothing to divide by, and what is not finite has to go
        outside = tl.where(outside == 0, 0.0, outside * 0 + 1)
    tl.store(results[0], value.to(tl.float32))
    tl.store(results[1], (outside * poison).to(tl.float32))
    tl.store(results[2], wrong.to(tl.float32))


class Fold(NamedTuple):
    """How partial sums of many programs become few enough for one of them."""

    count: int
    programs: int  # that are left
    launch: Launch | None  # None where there are few already

    @classmethod
    def of(cls, count: int, programs: int) -> Fold:
        if programs <= FEW:
            return cls(count, programs, None)
        fewer = triton.cdiv(programs, BLOCK)
        constants = {"COUNT": count, "BLOCK": BLOCK}
        operands = (GIVEN, programs, GIVEN)
        return cls(count, fewer, Launch(fold_kernel, fewer, *operands, **constants, num_warps=8))

    def __call__(self, partials: Tensor) -> Tensor:
        if self.launch is None:
            return partials
        sums = partials.new_empty((self.count, self.programs), dtype=torch.float64)
        self.launch(partials, sums)
        return sums


def partial_sums(results: Sequence[Tensor], count: int, programs: int) -> Tensor:
    """Room for `count` sums of each program of a call with these results."""
    return results[0].new_empty((count, programs))


def prepare_total(
    kernel: Any, count: int, programs: int, call: Any, counted: bool = False
) -> Callable[..., None]:
    """What adds up `count` sums of programs: it is given these and the results.

    kernel: consistency_total_kernel or cross_entropy_total_kernel.
    counted: and it is given the denominator that the gradient has already.
    """
    fold = Fold.of(count, programs)
    inside = GIVEN if counted else call.scale.inside
    operands = (GIVEN, fold.programs, GIVEN, call.pixels, inside)
    constants = {"COUNT": count, **call.total, "COMPLETE": counted or call.scale.complete}
    launch = Launch(kernel, 1, *operands, **constants, BLOCK=BLOCK, num_warps=8)

    def total(partials: Tensor, results: tuple[Tensor, ...], *denominator: Tensor) -> None:
        launch(fold(partials), results, *denominator)

    return total
