"""cross_entropy of logits at output resolution, with the gradient: each logit is read once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmt.kernels.calls import CrossEntropyCall, Run
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
from fastmt.kernels.denominator import denominator_pays, prepare_denominator
from fastmt.kernels.labels import class_weights, label_loss, label_weight
from fastmt.kernels.launch import GIVEN, Launch
from fastmt.kernels.sums import cross_entropy_total_kernel, partial_sums, prepare_total
from fastmt.kernels.views import describe, inside_of, lie_apart, map_at, place_of
from fastmt.kernels.weights import any_of, masked, put_count, put_sum, zeros


@triton.jit
def cross_entropy_kernel(
    logits,
    gradient,
    labels,
    pixel_weight,
    class_weight,
    partials,
    sizes,
    strides,
    ignore_index,
    smoothing,
    gradient_scale,
    COUNTED: tl.constexpr,
    PLAIN: tl.constexpr,
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
    w, mean_weight, spread = class_weights(class_weight, classes, smoothing, CLASSES)
    place = place_of(tl.program_id(0), sizes, BLOCK)
    inside = inside_of(place, lanes, sizes, WHOLE)
    fetch_column(logits, strides[0], place, sizes, classes, FETCH, BLOCK, CLASSES)
    given = map_at(labels, strides[2], place, lanes, inside).to(tl.int64)
    factor = map_at(pixel_weight, strides[3], place, lanes, inside)
    label, keep, wrong, weight, own_weight = label_weight(
        given, inside, factor, ignore_index, class_weight, spread, CLASSES
    )
    active = weight != 0.0
    put_sum(partials, 1, wrong.to(tl.int32))
    put_count(partials, 2 if COUNTED else 4)
    if not COUNTED:
        put_sum(partials, 2, tl.where(active, weight * own_weight, 0.0))
        put_sum(partials, 3, keep.to(tl.int32))

    loss = tl.zeros_like(weight)
    if any_of(active):
        coefficient = weight * scale_of(gradient_scale, COUNTED)
        weights = w, own_weight, mean_weight
        z = load_column(logits, strides[0], place, lanes, classes, inside, CLASSES)
        value, slope = label_loss(
            z, label, coefficient, classes, weights, smoothing, PLAIN, CLASSES
        )
        loss = tl.where(active, weight * value, 0.0)
        if GRADIENT:
            slope = masked(slope, active, gradient.dtype.element_ty)
            store_column(gradient, strides[1], place, lanes, classes, slope, inside, CLASSES)
    elif GRADIENT:
        nothing = zeros(classes, lanes)
        store_column(gradient, strides[1], place, lanes, classes, nothing, inside, CLASSES)
    put_sum(partials, 0, loss)


@triton.jit
def scale_of(gradient_scale, COUNTED: tl.constexpr):
    """COUNTED: it lies where denominator.py has left it."""
    if COUNTED:
        return tl.load(gradient_scale).to(tl.float32)
    else:
        return gradient_scale


def prepare(call: CrossEntropyCall, logits: Tensor, gradient: Tensor | None) -> Run:
    """What fills the gradient and the results of a call."""
    classes = logits.shape[1]
    denominator = None
    if gradient is not None and denominator_pays(call, gradient):
        denominator = prepare_denominator(call, classes)
    counted = denominator is not None
    columns = [logits, logits if gradient is None else gradient]
    blocks = blocks_for(classes, logits.itemsize, 2, lie_apart(columns))
    block, warps, tiles, vector = blocks
    pixels = describe(columns, [call.labels, call.pixel_weight], block)
    launch = Launch(
        cross_entropy_kernel,
        pixels.blocks,
        *[GIVEN] * 6,
        pixels.sizes,
        pixels.strides,
        call.ignore_index,
        GIVEN,
        GIVEN,
        COUNTED=counted,
        PLAIN=call.plain,
        GRADIENT=gradient is not None,
        CLASSES=classes,
        TILES=tiles,
        BLOCK=block,
        VECTOR=vector,
        WIDE=pixels.wide,
        WHOLE=pixels.whole,
        FETCH=fetches(blocks, logits.itemsize),
        num_warps=warps,
        num_stages=1,
        registers=registers_for(blocks, classes, logits.itemsize),
    )

    count = 2 if counted else 4
    total = prepare_total(cross_entropy_total_kernel, count, pixels.blocks, call, counted)
    known = call.scale.inside

    def run(logits, gradient, labels, pixel_weight, class_weight, smoothing, results):
        maps = (labels, pixel_weight, class_weight)
        inside = denominator(*maps, smoothing, results) if counted else known
        partials = partial_sums(results, count, pixels.blocks)
        written = logits if gradient is None else gradient
        launch(logits, written, *maps, partials, smoothing, inside)
        total(partials, results, *([inside] if counted else []))

    return run
