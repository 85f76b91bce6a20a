"""consistency_loss of logits at output resolution, with the gradient: each logit is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastmt.kernels import pixel
from fastmt.kernels.calls import ConsistencyCall
from fastmt.kernels.columns import blocks_for, classes_of, load_column, store_column
from fastmt.kernels.teachers import dense_teacher
from fastmt.kernels.views import describe, device_of, inside_of, map_at, pixels_at, place_of
from fastmt.kernels.weights import any_of, consistency_weight, count, weighted, zeros
from torch import Tensor


@triton.jit
def consistency_kernel(
    student,
    student_strides,
    gradient,
    gradient_strides,
    teachers,
    teacher_strides,
    pixel_weight,
    pixel_weight_strides,
    valid,
    valid_strides,
    threshold,
    partials,
    sizes,
    blocks,
    inverse_temperature,
    gradient_scale,
    LOSS: tl.constexpr,
    CLASS_SHARE: tl.constexpr,
    KIND: tl.constexpr,
    WEIGHT: tl.constexpr,
    STRICT: tl.constexpr,
    BY_LABEL: tl.constexpr,
    GRADIENT: tl.constexpr,
    CLASSES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    classes = classes_of(TILES)
    loss_sum = 0.0
    weight_sum = 0.0
    score_sum = 0.0
    selected = 0.0
    valid_sum = 0.0
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        place = place_of(block, sizes, BLOCK)
        inside = inside_of(place, sizes, BLOCK)
        score, label, q = dense_teacher(
            teachers,
            teacher_strides,
            place,
            classes,
            inside,
            inverse_temperature,
            KIND,
            CLASSES,
            BLOCK,
            WIDE,
        )
        keep = inside & (map_at(valid, valid_strides, place, inside, BLOCK, WIDE) != 0)
        factor = map_at(pixel_weight, pixel_weight_strides, place, inside, BLOCK, WIDE)
        weight, passing = consistency_weight(
            score, label, keep, factor, threshold, BY_LABEL, STRICT, WEIGHT
        )
        weight_sum += tl.sum(weight, 0)
        score_sum += tl.sum(tl.where(keep, score, 0.0), 0)
        selected += count(passing)
        valid_sum += count(keep)

        active = weight != 0.0
        gradient_at = pixels_at(gradient, gradient_strides, place, BLOCK, WIDE)
        if any_of(active):
            z_at = pixels_at(student, student_strides, place, BLOCK, WIDE)
            z = load_column(z_at, student_strides[0], classes, inside, CLASSES, WIDE)
            value, slope = pixel.consistency_pixel(z, q, label, classes, LOSS, CLASSES)
            share = weight * CLASS_SHARE
            loss_sum += tl.sum(tl.where(active, share * value, 0.0), 0)
            if GRADIENT:
                tiles = weighted(slope, share * gradient_scale, active)
                store_column(
                    gradient_at, gradient_strides[0], classes, tiles, inside, CLASSES, WIDE
                )
        elif GRADIENT:
            tiles = zeros(classes, BLOCK)
            store_column(gradient_at, gradient_strides[0], classes, tiles, inside, CLASSES, WIDE)
    programs = tl.num_programs(0)
    sum_at = partials + tl.program_id(0)
    tl.store(sum_at, loss_sum)
    tl.store(sum_at + programs, weight_sum)
    tl.store(sum_at + 2 * programs, score_sum)
    tl.store(sum_at + 3 * programs, selected)
    tl.store(sum_at + 4 * programs, valid_sum)


def consistency(call: ConsistencyCall, student: Tensor, gradient: Tensor | None) -> Tensor:
    """Fills the gradient and returns the partial sums (5, programs)."""
    classes = student.shape[1]
    itemsize = min(t.itemsize for t in (student, *call.teacher))
    block, warps, tiles = blocks_for(classes, itemsize, call.columns)
    written = student if gradient is None else gradient
    columns = [student, written, *call.teacher]
    pixels = describe(columns, [call.pixel_weight, call.valid], block)
    partials = student.new_empty((5, pixels.programs()), dtype=torch.float32)
    with device_of(student):
        consistency_kernel[(pixels.programs(),)](
            student,
            pixels.strides[0],
            written,
            pixels.strides[1],
            tuple(call.teacher),
            tuple(pixels.strides[2:-2]),
            call.pixel_weight,
            pixels.strides[-2],
            call.valid,
            pixels.strides[-1],
            call.threshold,
            partials,
            pixels.sizes,
            pixels.blocks,
            call.inverse_temperature,
            call.scale.inside,
            **call.constants,
            GRADIENT=gradient is not None,
            CLASSES=classes,
            TILES=tiles,
            BLOCK=block,
            WIDE=pixels.wide(classes, block),
            num_warps=warps,
            num_stages=1,
        )
    return partials
