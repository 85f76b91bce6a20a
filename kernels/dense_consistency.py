"""consistency_loss of logits at output resolution, with the gradient: each logit is read once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmt.kernels import pixel
from fastmt.kernels.calls import ConsistencyCall, Run
from fastmt.kernels.columns import (
    blocks_for,
    classes_of,
    fetch_column,
    fetches,
    lanes_of,
    load_column,
    registers_for,
    store_column,
)
from fastmt.kernels.launch import GIVEN, Launch
from fastmt.kernels.sums import consistency_total_kernel, partial_sums, prepare_total
from fastmt.kernels.teachers import dense_teacher
from fastmt.kernels.views import describe, inside_of, lie_apart, map_at, place_of
from fastmt.kernels.weights import any_of, consistency_weight, masked, put_count, put_sum, zeros


@triton.jit
def consistency_kernel(
    student,
    gradient,
    teachers,
    pixel_weight,
    valid,
    threshold,
    partials,
    sizes,
    strides,
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
    CLASSES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    FETCH: tl.constexpr,
):
    lanes = lanes_of(BLOCK, VECTOR, WIDE)
    classes = classes_of(TILES, WIDE)
    place = place_of(tl.program_id(0), sizes, BLOCK)
    inside = inside_of(place, lanes, sizes, WHOLE)
    fetch_column(student, strides[0], place, sizes, classes, FETCH, BLOCK, CLASSES)
    score, label, q = dense_teacher(
        teachers,
        strides,
        place,
        lanes,
        classes,
        inside,
        inverse_temperature,
        2,
        KIND,
        CLASSES,
    )
    keep = inside & (map_at(valid, strides[-1], place, lanes, inside) != 0)
    factor = map_at(pixel_weight, strides[-2], place, lanes, inside)
    weight, passing = consistency_weight(
        score, label, keep, factor, threshold, LIMIT, STRICT, WEIGHT
    )
    put_sum(partials, 1, weight if SUM_WEIGHTS else tl.zeros_like(weight))
    put_sum(partials, 2, tl.where(keep, score, 0.0))
    # As leaves the compiler with fewer registers: "mse" of 19 and 21 classes keeps to 168.
    counted = tl.int32 if LIMIT == "number" else tl.float32
    put_sum(partials, 3, passing.to(counted))
    put_sum(partials, 4, keep.to(counted))
    put_count(partials, 5)

    active = weight != 0.0
    loss = tl.zeros_like(weight)
    if any_of(active):
        z = load_column(student, strides[0], place, lanes, classes, inside, CLASSES)
        share = weight * CLASS_SHARE
        value, slope = pixel.consistency_pixel(
            z, q, label, share * gradient_scale, classes, LOSS, CLASSES
        )
        loss = tl.where(active, share * value, 0.0)
        if GRADIENT:
            slope = masked(slope, active, gradient.dtype.element_ty)
            store_column(gradient, strides[1], place, lanes, classes, slope, inside, CLASSES)
    elif GRADIENT:
        nothing = zeros(classes, lanes)
        store_column(gradient, strides[1], place, lanes, classes, nothing, inside, CLASSES)
    put_sum(partials, 0, loss)


def prepare(call: ConsistencyCall, student: Tensor, gradient: Tensor | None) -> Run:
    """What fills the gradient and the results of a call."""
    classes = student.shape[1]
    itemsize = min(t.itemsize for t in (student, *call.teacher))
    columns = [student, student if gradient is None else gradient, *call.teacher]
    blocks = blocks_for(classes, itemsize, call.columns, lie_apart(columns))
    block, warps, tiles, vector = blocks
    pixels = describe(columns, [call.pixel_weight, call.valid], block)
    launch = Launch(
        consistency_kernel,
        pixels.blocks,
        *[GIVEN] * 7,
        pixels.sizes,
        pixels.strides,
        GIVEN,
        call.scale.inside,
        **call.constants,
        GRADIENT=gradient is not None,
        CLASSES=classes,
        TILES=tiles,
        BLOCK=block,
        VECTOR=vector,
        WIDE=pixels.wide,
        WHOLE=pixels.whole,
        FETCH=fetches(blocks, student.itemsize),
        num_warps=warps,
        num_stages=1,
        registers=registers_for(blocks, classes, itemsize),
    )

    total = prepare_total(consistency_total_kernel, 5, pixels.blocks, call)

    def run(student, gradient, teacher, pixel_weight, valid, threshold, temperature, results):
        partials = partial_sums(results, 5, pixels.blocks)
        written = student if gradient is None else gradient
        launch(student, written, teacher, pixel_weight, valid, threshold, partials, temperature)
        total(partials, results)

    return run
