"""Weights of pixels and what they add to the sums of a loss."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmt.kernels.halves import narrowed


@triton.jit
def consistency_weight(
    score,
    label,
    keep,
    pixel_weight,
    threshold,
    LIMIT: tl.constexpr,
    STRICT: tl.constexpr,
    WEIGHT: tl.constexpr,
):
    """The weight of each pixel, and which pixels pass: LIMIT says what the threshold is.

    "ratio" is 1 here: its factor is only known when every pixel has been counted.
    """
    limit = threshold
    if LIMIT == "by label":
        limit = tl.load(threshold + label)
    elif LIMIT == "one":
        limit = tl.load(threshold)
    passing = keep & (score > limit if STRICT else score >= limit)
    counts = passing if WEIGHT == "mask" or WEIGHT == "confidence" else keep
    base = score if WEIGHT == "confidence" else tl.full(score.shape, 1.0, tl.float32)
    weight = tl.where(counts & (base != 0.0), base * pixel_weight, 0.0)
    return weight, passing


@triton.jit
def put_sum(partials, row: tl.constexpr, values):
    """This program's part of the sum `row` of partials (rows, programs)."""
    tl.store(partials + row * tl.num_programs(0) + tl.program_id(0), tl.sum(values, 0))


@triton.jit
def put_count(partials, rows):
    """No program has added up these partial sums yet: behind them, 0 (sums.sums_of_all)."""
    tl.store(partials + rows * tl.num_programs(0), 0.0, mask=tl.program_id(0) == 0)


@triton.jit
def any_of(mask):
    return tl.max(mask.to(tl.int32), 0) > 0


@triton.jit
def masked(gradient, active, DTYPE: tl.constexpr):
    """The gradient in DTYPE where active, exactly 0 elsewhere, even of NaN."""
    tiles = ()
    for i in tl.static_range(len(gradient)):
        tiles = tiles + (narrowed(gradient[i], active, DTYPE),)
    return tiles


@triton.jit
def zeros(classes, lanes):
    """A column of zeros."""
    tiles = ()
    for i in tl.static_range(len(classes)):
        tiles = tiles + (tl.zeros((classes[i].shape[0], lanes.shape[0]), tl.float32),)
    return tiles
