"""Partial sums of programs added up in a fixed order, and the scalars that follow from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmt.kernels.launch import GIVEN, Launch

ROWS = 8  # of partial sums that are added up at once
NORMALIZATIONS = ("all", "valid", "selected", "weight")
BLOCK = 1024
FEW = 4096  # partial sums that one program adds up


class GradientScale:
    """How a gradient is scaled: `inside` the kernel, and by the rest when backward hands it out.

    A gradient takes its denominator, the number of pixels, inside where that is known, which saves
    the backward pass its scaling. In float16 it would drown in the subnormals before the caller's
    loss scale lifts it; there only the pixels of one low-resolution cell are divided out, so that
    their sum stays in range.
    """

    def __init__(self, logits: Tensor, pixels: int, known: bool) -> None:
        self.complete = known and logits.dtype != torch.float16
        cells = logits.numel() / logits.shape[1]
        in_cell = pixels / cells if logits.dtype == torch.float16 else 1.0
        self.inside = 1 / pixels if self.complete else 1 / max(in_cell, 1.0)


def scalars(like: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    first = like.new_empty((), dtype=dtype)
    return [first, *(torch.empty_like(first) for _ in range(count - 1))]


@triton.jit
def add_up(partials, begin, end, programs, COUNT, ROWS: tl.constexpr, BLOCK: tl.constexpr):
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
def lowest_of(values, begin, end, BLOCK: tl.constexpr):
    """The lowest of values [begin, end)."""
    lowest = tl.full((BLOCK,), 2**63 - 1, tl.int64)
    for first in range(begin, end, BLOCK):
        lanes = first + tl.arange(0, BLOCK)
        value = tl.load(values + lanes, mask=lanes < end, other=2**63 - 1)
        lowest = tl.minimum(lowest, value)
    return tl.min(lowest, 0)


@triton.jit
def fold_kernel(
    partials,
    labels,
    programs,
    folded,
    folded_labels,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums of BLOCK programs each, in float64, and the lowest of their labels, if any."""
    begin = tl.program_id(0) * BLOCK
    end = tl.minimum(begin + BLOCK, programs)
    totals = add_up(partials, begin, end, programs, COUNT, ROWS, BLOCK)
    rows = tl.arange(0, ROWS)
    at = folded + rows * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, totals, mask=rows < COUNT)
    if labels is not None:
        tl.store(folded_labels + tl.program_id(0), lowest_of(labels, begin, end, BLOCK))


@triton.jit
def pick(totals, row: tl.constexpr, ROWS: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, ROWS) == row, totals, 0.0), 0)


@triton.jit
def ratio(numerator, denominator):
    """numerator / denominator, 0 where there is nothing to divide by."""
    empty = denominator == 0
    return tl.where(empty, 0.0, numerator / tl.where(empty, 1.0, denominator))


@triton.jit
def consistency_total_kernel(
    partials,
    programs,
    loss,
    selected,
    mean_score,
    scale,
    pixels,
    inside,
    NORMALIZE: tl.constexpr,
    RATIO: tl.constexpr,
    COMPLETE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From (loss, weight, score, selected, valid) of each program, the scalars of the call."""
    totals = add_up(partials, 0, programs, programs, 5, ROWS, BLOCK)
    passing = pick(totals, 3, ROWS)
    valid = pick(totals, 4, ROWS)
    fraction = ratio(passing, valid)
    factor = fraction if RATIO else fraction * 0 + 1
    if NORMALIZE == "all":
        denominator = valid * 0 + pixels
    elif NORMALIZE == "valid":
        denominator = valid
    elif NORMALIZE == "selected":
        denominator = passing
    else:
        denominator = factor * pick(totals, 1, ROWS)
    value = tl.where(factor == 0, 0.0, ratio(factor * pick(totals, 0, ROWS), denominator))
    outside = ratio(factor, denominator) / inside
    tl.store(loss, value.to(tl.float32))
    tl.store(selected, fraction.to(tl.float32))
    tl.store(mean_score, ratio(pick(totals, 2, ROWS), valid).to(tl.float32))
    tl.store(scale, 1.0 if COMPLETE else outside.to(tl.float32))


@triton.jit
def cross_entropy_total_kernel(
    partials,
    wrong_labels,
    programs,
    loss,
    scale,
    wrong,
    wrong_label,
    pixels,
    inside,
    NORMALIZE: tl.constexpr,
    COMPLETE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From (loss, weight, valid, wrong) of each program, the scalars of the call.

    A label out of range makes loss and gradient NaN. `wrong` such labels came, the lowest of them
    is `wrong_label`.
    """
    totals = add_up(partials, 0, programs, programs, 4, ROWS, BLOCK)
    valid = pick(totals, 2, ROWS)
    count = pick(totals, 3, ROWS)
    if NORMALIZE == "all":
        denominator = valid * 0 + pixels
    elif NORMALIZE == "valid":
        denominator = valid
    else:
        denominator = pick(totals, 1, ROWS)
    poison = tl.where(count > 0, float("nan"), 1.0)
    value = ratio(pick(totals, 0, ROWS), denominator) * poison
    outside = ratio(1.0, denominator) / inside
    if COMPLETE:
        outside = outside * 0 + 1
    tl.store(loss, value.to(tl.float32))
    tl.store(scale, (outside * poison).to(tl.float32))
    tl.store(wrong, count.to(tl.int64))
    tl.store(wrong_label, lowest_of(wrong_labels, 0, programs, BLOCK))


class Fold(NamedTuple):
    """How partial sums, and lowest labels, of many programs become few enough for one of them."""

    count: int
    programs: int  # that are left
    launch: Launch | None  # None where there are few already

    @classmethod
    def of(cls, count: int, programs: int) -> Fold:
        if programs <= FEW:
            return cls(count, programs, None)
        fewer = triton.cdiv(programs, BLOCK)
        constants = {"COUNT": count, "ROWS": ROWS, "BLOCK": BLOCK}
        operands = (GIVEN, GIVEN, programs, GIVEN, GIVEN)
        return cls(count, fewer, Launch(fold_kernel, fewer, *operands, **constants, num_warps=8))

    def __call__(
        self, partials: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.launch is None:
            return partials, labels
        sums = partials.new_empty((self.count, self.programs), dtype=torch.float64)
        lowest = None if labels is None else labels.new_empty(self.programs)
        self.launch(partials, labels, sums, lowest)
        return sums, lowest


def prepare_consistency_total(
    programs: int, scale: GradientScale, pixels: int, normalize: str, ratio: bool
) -> Callable[[Tensor], list[Tensor]]:
    """From partial sums (5, programs): (loss, selected, mean_score, scale) on the device."""
    fold = Fold.of(5, programs)
    launch = Launch(
        consistency_total_kernel,
        1,
        GIVEN,
        fold.programs,
        *[GIVEN] * 4,
        float(pixels),
        scale.inside,
        NORMALIZE=normalize,
        RATIO=ratio,
        COMPLETE=scale.complete,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=8,
    )

    def total(partials: Tensor) -> list[Tensor]:
        results = scalars(partials, torch.float32, 4)
        partials, _ = fold(partials)
        launch(partials, *results)
        return results

    return total


def prepare_cross_entropy_total(
    programs: int, scale: GradientScale, pixels: int, normalize: str
) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """From partial sums (4, programs) and lowest wrong labels, (loss, scale, labels out of range,
    the lowest of them) on the device.
    """
    fold = Fold.of(4, programs)
    launch = Launch(
        cross_entropy_total_kernel,
        1,
        GIVEN,
        GIVEN,
        fold.programs,
        *[GIVEN] * 4,
        float(pixels),
        scale.inside,
        NORMALIZE=normalize,
        COMPLETE=scale.complete,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=8,
    )

    def total(partials: Tensor, wrong_labels: Tensor) -> list[Tensor]:
        results = scalars(partials, torch.float32, 2) + scalars(partials, torch.int64, 2)
        launch(*fold(partials, wrong_labels), *results)
        return results

    return total
