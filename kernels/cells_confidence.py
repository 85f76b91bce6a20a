"""softmax_confidence with the up-sampling inside: scores and labels are all that is written."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastmt.kernels.cells import strip_of, strips_for, walk_of
from fastmt.kernels.columns import classes_of
from fastmt.kernels.grid import band_of, corners, first_beyond, neighbours
from fastmt.kernels.launch import GIVEN, Launch
from fastmt.kernels.teachers import cells_teacher


@triton.jit
def cells_confidence_kernel(
    teachers,
    grid,
    grids,
    score,
    label,
    out_height,
    out_width,
    strips,
    inverse_temperature,
    KIND: tl.constexpr,
    SHARED: tl.constexpr,
    CLASSES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    classes = classes_of(TILES, WIDE)
    image, band, begin = strip_of(strips, grid[0][0], BLOCK, WIDE)
    columns = begin + tl.arange(0, BLOCK)
    inside = columns < out_width
    before, after, t = corners(columns, grid[1])
    data = teachers[0] + image * grid[2][0]
    upper, step = band_of(data, band, grid, before, after, t, classes, CLASSES)
    first = first_beyond(band, grid[0], out_height)
    for j in range(first_beyond(band + 1, grid[0], out_height) - first):
        row = first + j
        _, down = neighbours(row, grid[0])
        value, best, _ = cells_teacher(
            teachers,
            grids,
            image,
            row,
            columns,
            upper,
            step,
            down,
            classes,
            inverse_temperature,
            SHARED,
            KIND,
            CLASSES,
        )
        at = (image * out_height + row) * out_width + columns
        tl.store(score + at, value, mask=inside)
        tl.store(label + at, best.to(tl.int64), mask=inside)


def prepare(logits: Sequence[Tensor], kind: str, score: Tensor, align_corners: bool) -> Launch:
    """The launch that fills score (N, *size) float32 and label (N, *size) int64.

    Both lie like `score` does. It is given (logits, score, label, inverse_temperature).
    """
    classes = logits[0].shape[1]
    _, block, warps, tiles = strips_for(classes, 6 if kind == "entropy" else 5, gradient=False)
    walk = walk_of(logits[0], logits, tuple(score.shape[1:]), align_corners, block)
    return Launch(
        cells_confidence_kernel,
        walk.programs,
        GIVEN,
        walk.first,
        walk.others,
        GIVEN,
        GIVEN,
        *walk.size,
        walk.strips,
        GIVEN,
        KIND=kind,
        SHARED=len(logits) == 1,
        CLASSES=classes,
        TILES=tiles,
        BLOCK=block,
        WIDE=walk.wide(classes, score),
        num_warps=warps,
        num_stages=1,
    )
