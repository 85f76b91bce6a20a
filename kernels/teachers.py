"""Score, label and probabilities of one teacher or an ensemble of them, at a block of pixels."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmt.kernels import pixel
from fastmt.kernels.columns import load_column
from fastmt.kernels.grid import band_of, between, corners, neighbours


@triton.jit
def dense_teacher(
    teachers,
    strides,
    place,
    lanes,
    classes,
    inside,
    inverse_temperature,
    FIRST: tl.constexpr,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """(score, label, q) as teacher_pixel gives them, from one pointer a member of the ensemble."""
    q = ()
    for m in tl.static_range(len(teachers)):
        own = strides[FIRST + m]
        y = load_column(teachers[m], own, place, lanes, classes, inside, CLASSES)
        if len(teachers) == 1:
            score, label, q = pixel.teacher_pixel(y, classes, inverse_temperature, KIND, CLASSES)
        else:
            q = pixel.add_member(q, y, inverse_temperature)
    if len(teachers) > 1:
        score, label, q = pixel.ensemble_pixel(q, classes, len(teachers), KIND, CLASSES)
    return score, label, q


@triton.jit
def cells_teacher(
    teachers,
    grids,
    image,
    row,
    columns,
    upper,
    step,
    t,
    classes,
    inverse_temperature,
    SHARED: tl.constexpr,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """(score, label, q) at an output row.

    SHARED: the one teacher has the grid of the bands, and its rows are `upper` and the next, `step`
    away; else each member's rows are read anew.
    """
    q = ()
    for m in tl.static_range(len(teachers)):
        if SHARED:
            y = between(upper, step, t, classes, CLASSES)
        else:
            grid = grids[m]
            above, down = neighbours(row, grid[0])
            before, after, across = corners(columns, grid[1])
            data = teachers[m] + image * grid[2][0]
            first, change = band_of(data, above, grid, before, after, across, classes, CLASSES)
            y = between(first, change, down, classes, CLASSES)
        if len(teachers) == 1:
            score, label, q = pixel.teacher_pixel(y, classes, inverse_temperature, KIND, CLASSES)
        else:
            q = pixel.add_member(q, y, inverse_temperature)
    if len(teachers) > 1:
        score, label, q = pixel.ensemble_pixel(q, classes, len(teachers), KIND, CLASSES)
    return score, label, q
