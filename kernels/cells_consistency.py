"""consistency_loss with the up-sampling inside, and the gradient at low resolution."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmt.kernels import pixel
from fastmt.kernels.calls import ConsistencyCall, Run
from fastmt.kernels.cells import (
    ROWS,
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
from fastmt.kernels.launch import GIVEN, Launch
from fastmt.kernels.sums import consistency_total_kernel, partial_sums, prepare_total
from fastmt.kernels.teachers import cells_teacher
from fastmt.kernels.weights import any_of, consistency_weight, masked, put_count, put_sum, zeros


@triton.jit
def cells_consistency_kernel(
    student,
    grid,
    teachers,
    grids,
    pixel_weight,
    pixel_weight_strides,
    valid,
    valid_strides,
    threshold,
    partials,
    scratch,
    out_height,
    out_width,
    strips,
    span,
    inverse_temperature,
    gradient_scale,
    LOSS: tl.constexpr,
    CLASS_SHARE: tl.constexpr,
    KIND: tl.constexpr,
    WEIGHT: tl.constexpr,
    STRICT: tl.constexpr,
    LIMIT: tl.constexpr,
    SUM_WEIGHTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    SHARED: tl.constexpr,
    CLASSES: tl.constexpr,
    TILES: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    classes = classes_of(TILES, WIDE)
    image, band, begin = strip_of(strips, grid[0][0], STRIP, WIDE)
    data = student + image * grid[2][0]
    first = first_beyond(band, grid[0], out_height)
    rows = first_beyond(band + 1, grid[0], out_height) - first
    loss_sum = tl.zeros((BLOCK,), tl.float32)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    score_sum = tl.zeros((BLOCK,), tl.float32)
    selected = tl.zeros((BLOCK,), tl.float32)
    valid_sum = tl.zeros((BLOCK,), tl.float32)
    for piece in range(STRIP // BLOCK):
        columns = begin + piece * BLOCK + tl.arange(0, BLOCK)
        inside = columns < out_width
        before, after, t = corners(columns, grid[1])
        upper, step = band_of(data, band, grid, before, after, t, classes, CLASSES)
        teacher_upper, teacher_step = upper, step
        if SHARED:
            teacher_data = teachers[0] + image * grids[0][2][0]
            teacher_upper, teacher_step = band_of(
                teacher_data, band, grids[0], before, after, t, classes, CLASSES
            )
        upper_sum = zeros(classes, columns)
        lower_sum = zeros(classes, columns)
        for j in range(rows):
            row = first + j
            _, down = neighbours(row, grid[0])
            score, label, q = cells_teacher(
                teachers,
                grids,
                image,
                row,
                columns,
                teacher_upper,
                teacher_step,
                down,
                classes,
                inverse_temperature,
                SHARED,
                KIND,
                CLASSES,
            )
            keep = inside & (map_row(valid, valid_strides, image, row, columns, inside) != 0)
            factor = map_row(pixel_weight, pixel_weight_strides, image, row, columns, inside)
            weight, passing = consistency_weight(
                score, label, keep, factor, threshold, LIMIT, STRICT, WEIGHT
            )
            if SUM_WEIGHTS:
                weight_sum += weight
            score_sum += tl.where(keep, score, 0.0)
            selected += passing.to(tl.float32)
            if valid is not None:
                valid_sum += keep.to(tl.float32)
            active = weight != 0.0
            if any_of(active):
                z = between(upper, step, down, classes, CLASSES)
                share = weight * CLASS_SHARE
                value, slope = pixel.consistency_pixel(
                    z, q, label, share * gradient_scale, classes, LOSS, CLASSES
                )
                loss_sum += tl.where(active, share * value, 0.0)
                if GRADIENT:
                    slope = masked(slope, active, tl.float32)
                    upper_sum = add_scaled(upper_sum, 1.0 - down, slope)
                    lower_sum = add_scaled(lower_sum, down, slope)
        if valid is None:
            valid_sum += inside.to(tl.float32) * rows
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
    put_sum(partials, 1, weight_sum)
    put_sum(partials, 2, score_sum)
    put_sum(partials, 3, selected)
    put_sum(partials, 4, valid_sum)
    put_count(partials, 5)


def prepare(
    call: ConsistencyCall,
    student: Tensor,
    size: tuple[int, int],
    align_corners: bool,
    gradient: Tensor | None,
) -> Run:
    """What fills the gradient and the results of a call."""
    classes, teacher = student.shape[1], call.teacher
    strip = strips_for(classes, ROWS + call.columns)
    walk = walk_of(student, teacher, size, align_corners, strip.pixels)
    wide = walk.wide(classes, call.pixel_weight, call.valid)
    launch = Launch(
        cells_consistency_kernel,
        walk.programs,
        GIVEN,
        walk.first,
        GIVEN,
        walk.others,
        GIVEN,
        None if call.pixel_weight is None else call.pixel_weight.stride(),
        GIVEN,
        None if call.valid is None else call.valid.stride(),
        GIVEN,
        GIVEN,
        GIVEN,
        *size,
        walk.strips,
        walk.span,
        GIVEN,
        call.scale.inside,
        **call.constants,
        GRADIENT=gradient is not None,
        SHARED=len(teacher) == 1 and teacher[0].shape == student.shape,
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

    total = prepare_total(consistency_total_kernel, 5, walk.programs, call)

    def run(student, gradient, teacher, pixel_weight, valid, threshold, temperature, results):
        partials = partial_sums(results, 5, walk.programs)
        scratch = partials if gradient is None else walk.scratch(student, strip)
        launch(student, teacher, pixel_weight, valid, threshold, partials, scratch, temperature)
        if gradient is not None:
            join(scratch, gradient)
        total(partials, results)

    return run
