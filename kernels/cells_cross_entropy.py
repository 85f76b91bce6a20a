"""cross_entropy with the up-sampling inside, and the gradient at low resolution."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmt.kernels.calls import CrossEntropyCall, Run
from fastmt.kernels.cells import (
    WINDOW,
    map_row,
    precision,
    prepare_join,
    strip_of,
    strips_for,
    walk_of,
)
from fastmt.kernels.columns import classes_of
from fastmt.kernels.grid import (
    add_scaled,
    band_of,
    between,
    corners,
    first_beyond,
    neighbours,
    put_strip,
)
from fastmt.kernels.labels import class_weights, label_loss, label_weight
from fastmt.kernels.launch import GIVEN, Launch
from fastmt.kernels.sums import cross_entropy_total_kernel, partial_sums, prepare_total
from fastmt.kernels.weights import any_of, masked, put_count, put_sum, zeros

ROWS = 4  # columns of a band: two of the logits, two of the gradient


@triton.jit
def cells_cross_entropy_kernel(
    logits,
    grid,
    labels,
    labels_strides,
    pixel_weight,
    pixel_weight_strides,
    class_weight,
    partials,
    scratch,
    out_height,
    out_width,
    strips,
    span,
    ignore_index,
    smoothing,
    gradient_scale,
    PLAIN: tl.constexpr,
    GRADIENT: tl.constexpr,
    CLASSES: tl.constexpr,
    TILES: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    classes = classes_of(TILES, WIDE)
    w, mean_weight, spread = class_weights(class_weight, classes, smoothing, CLASSES)
    image, band, begin = strip_of(strips, grid[0][0], STRIP, WIDE)
    data = logits + image * grid[2][0]
    first = first_beyond(band, grid[0], out_height)
    rows = first_beyond(band + 1, grid[0], out_height) - first
    loss_sum = tl.zeros((BLOCK,), tl.float32)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    valid_sum = tl.zeros((BLOCK,), tl.float32)
    wrong_sum = tl.zeros((BLOCK,), tl.float32)
    for piece in range(STRIP // BLOCK):
        columns = begin + piece * BLOCK + tl.arange(0, BLOCK)
        inside = columns < out_width
        before, after, t = corners(columns, grid[1])
        upper, step = band_of(data, band, grid, before, after, t, classes, CLASSES)
        upper_sum = zeros(classes, columns)
        lower_sum = zeros(classes, columns)
        for j in range(rows):
            row = first + j
            _, down = neighbours(row, grid[0])
            given = map_row(labels, labels_strides, image, row, columns, inside).to(tl.int64)
            factor = map_row(pixel_weight, pixel_weight_strides, image, row, columns, inside)
            label, keep, wrong, weight, own_weight = label_weight(
                given, inside, factor, ignore_index, class_weight, spread, CLASSES
            )
            active = weight != 0.0
            weight_sum += tl.where(active, weight * own_weight, 0.0)
            valid_sum += keep.to(tl.float32)
            wrong_sum += wrong.to(tl.float32)
            if any_of(active):
                weights = w, own_weight, mean_weight
                z = between(upper, step, down, classes, CLASSES)
                value, slope = label_loss(
                    z, label, weight * gradient_scale, classes, weights, smoothing, PLAIN, CLASSES
                )
                loss_sum += tl.where(active, weight * value, 0.0)
                if GRADIENT:
                    slope = masked(slope, active, tl.float32)
                    upper_sum = add_scaled(upper_sum, 1.0 - down, slope)
                    lower_sum = add_scaled(lower_sum, down, slope)
        if GRADIENT:
            sums = (upper_sum, lower_sum)
            put_strip(
                scratch,
                sums,
                begin,
                before,
                after,
                t,
                grid[1],
                span,
                classes,
                CLASSES,
                STRIP,
                WINDOW,
                PRECISION,
            )
    put_sum(partials, 0, loss_sum)
    put_sum(partials, 1, wrong_sum)
    put_sum(partials, 2, weight_sum)
    put_sum(partials, 3, valid_sum)
    put_count(partials, 4)


def prepare(
    call: CrossEntropyCall, logits: Tensor, align_corners: bool, gradient: Tensor | None
) -> Run:
    """What fills the gradient and the results of a call."""
    classes, size = logits.shape[1], tuple(call.labels.shape[1:])
    strip = strips_for(classes, ROWS + 2)
    walk = walk_of(logits, [], size, align_corners, strip.pixels)
    wide = walk.wide(classes, call.labels, call.pixel_weight)
    launch = Launch(
        cells_cross_entropy_kernel,
        walk.programs,
        GIVEN,
        walk.first,
        GIVEN,
        call.labels.stride(),
        GIVEN,
        None if call.pixel_weight is None else call.pixel_weight.stride(),
        GIVEN,
        GIVEN,
        GIVEN,
        *size,
        walk.strips,
        walk.span,
        call.ignore_index,
        GIVEN,
        call.scale.inside,
        PLAIN=call.plain,
        GRADIENT=gradient is not None,
        CLASSES=classes,
        TILES=strip.tiles,
        STRIP=strip.pixels,
        BLOCK=strip.piece,
        WINDOW=WINDOW,
        PRECISION=precision(strip.warps),
        WIDE=wide,
        num_warps=strip.warps,
        num_stages=1,
    )
    join = None if gradient is None else prepare_join(walk, gradient, strip.pixels, wide)

    total = prepare_total(cross_entropy_total_kernel, 4, walk.programs, call)

    def run(logits, gradient, labels, pixel_weight, class_weight, smoothing, results):
        partials = partial_sums(results, 4, walk.programs)
        scratch = partials if gradient is None else walk.scratch(logits, strip)
        launch(logits, labels, pixel_weight, class_weight, partials, scratch, smoothing)
        if gradient is not None:
            join(scratch, gradient)
        total(partials, results)

    return run
