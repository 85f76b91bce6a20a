"""Partial sums of programs added up in a fixed order, and the scalars that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmt.kernels.launch import GIVEN, Launch

ROWS = tl.constexpr(8)  # of partial sums that are added up at once
NORMALIZATIONS = ("all", "valid", "selected", "weight")
BLOCK, WARPS = 1024, 8  # what one program adds up at once
FEW = 4096  # partial sums of each kind that one program adds up
SHARE = 256  # of more than these, what each of several programs adds up


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
def sums_of_all(partials, programs, shares, COUNT, BLOCK: tl.constexpr):
    """Float64 sums (ROWS,) over all programs of partials, and whether this program has them.

    With room for `shares`, (COUNT, programs of this kernel), each of these adds up BLOCK partial
    sums, and whichever is the last of them to be done what the others have left: in the order of
    their numbers, so that the sums do not depend on which it is. They count themselves behind the
    partial sums (put_count).
    """
    if shares is None:
        return add_up(partials, 0, programs, programs, COUNT, BLOCK), True
    else:
        own, every = tl.program_id(0), tl.num_programs(0)
        begin = own * BLOCK
        end = tl.minimum(begin + BLOCK, programs)
        totals = add_up(partials, begin, end, programs, COUNT, BLOCK)
        rows = tl.arange(0, ROWS)
        tl.store(shares + rows * every + own, totals, mask=rows < COUNT)
        count = (partials + COUNT * programs).to(tl.pointer_type(tl.int32))
        tl.debug_barrier()  # what all threads have stored is there for whom the count tells
        is_last = tl.atomic_add(count, 1, sem="acq_rel") == every - 1
        if is_last:
            totals = add_up(shares, 0, every, every, COUNT, BLOCK)
        return totals, is_last


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
    shares,
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
    totals, has_all = sums_of_all(partials, programs, shares, COUNT, BLOCK)
    if has_all:
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
    shares,
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
    totals, has_all = sums_of_all(partials, programs, shares, COUNT, BLOCK)
    if has_all:
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


def partial_sums(results: Sequence[Tensor], count: int, programs: int, **options: Any) -> Tensor:
    """Room for `count` sums of each program of a call with these results, and for put_count."""
    return results[0].new_empty(count * programs + 1, **options)


class Total:
    """The launch of a kernel that takes `count` sums of programs from sums_of_all.

    It is given the partial sums and what of the kernel's other operands is GIVEN.
    """

    def __init__(
        self, kernel: Any, count: int, programs: int, *operands: Any, **constants: Any
    ) -> None:
        several = programs > FEW
        adding = triton.cdiv(programs, SHARE) if several else 1
        self._shares = (count, adding) if several else None
        self._launch = Launch(
            kernel,
            adding,
            GIVEN,
            programs,
            GIVEN if several else None,
            *operands,
            COUNT=count,
            **constants,
            BLOCK=SHARE if several else BLOCK,
            # Of several one: what its threads store is stored when it counts itself.
            num_warps=1 if several else WARPS,
        )

    def __call__(self, partials: Tensor, *given: Any) -> None:
        if self._shares is not None:
            given = partials.new_empty(self._shares, dtype=torch.float64), *given
        self._launch(partials, *given)


def prepare_total(
    kernel: Any, count: int, programs: int, call: Any, counted: bool = False
) -> Callable[..., None]:
    """What adds up `count` sums of programs: it is given these and the results.

    kernel: consistency_total_kernel or cross_entropy_total_kernel.
    counted: and it is given the denominator that the gradient has already.
    """
    inside = GIVEN if counted else call.scale.inside
    complete = counted or call.scale.complete
    operands = (GIVEN, call.pixels, inside)
    return Total(kernel, count, programs, *operands, **call.total, COMPLETE=complete)
