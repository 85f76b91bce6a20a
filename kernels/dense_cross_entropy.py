"""cross_entropy of logits at output resolution, with the gradient: each logit is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastmt.kernels.calls import CrossEntropyCall
from fastmt.kernels.columns import blocks_for, classes_of, load_column, store_column
from fastmt.kernels.labels import class_weights, label_loss, label_weight
from fastmt.kernels.views import describe, device_of, inside_of, map_at, pixels_at, place_of
from fastmt.kernels.weights import any_of, count, weighted, zeros
from torch import Tensor


@triton.jit
def cross_entropy_kernel(
    logits,
    logits_strides,
    gradient,
    gradient_strides,
    labels,
    labels_strides,
    pixel_weight,
    pixel_weight_strides,
    class_weight,
    partials,
    wrong_labels,
    sizes,
    blocks,
    ignore_index,
    smoothing,
    gradient_scale,
    PLAIN: tl.constexpr,
    GRADIENT: tl.constexpr,
    CLASSES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    classes = classes_of(TILES)
    w, mean_weight = class_weights(class_weight, classes, CLASSES)
    loss_sum = 0.0
    weight_sum = 0.0
    valid_sum = 0.0
    wrong_sum = 0.0
    lowest = tl.full((), 2**63 - 1, tl.int64)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        place = place_of(block, sizes, BLOCK)
        inside = inside_of(place, sizes, BLOCK)
        given = map_at(labels, labels_strides, place, inside, BLOCK, WIDE).to(tl.int64)
        factor = map_at(pixel_weight, pixel_weight_strides, place, inside, BLOCK, WIDE)
        label, keep, wrong, weight, own_weight = label_weight(
            given, inside, factor, ignore_index, class_weight, CLASSES
        )
        active = weight != 0.0
        weight_sum += tl.sum(tl.where(active, weight * own_weight, 0.0), 0)
        valid_sum += count(keep)
        wrong_sum += count(wrong)
        lowest = tl.minimum(lowest, tl.min(tl.where(wrong, given, 2**63 - 1), 0))

        gradient_at = pixels_at(gradient, gradient_strides, place, BLOCK, WIDE)
        if any_of(active):
            z_at = pixels_at(logits, logits_strides, place, BLOCK, WIDE)
            z = load_column(z_at, logits_strides[0], classes, inside, CLASSES, WIDE)
            value, slope = label_loss(
                z, label, classes, w, own_weight, mean_weight, smoothing, PLAIN, CLASSES
            )
            loss_sum += tl.sum(tl.where(active, weight * value, 0.0), 0)
            if GRADIENT:
                tiles = weighted(slope, weight * gradient_scale, active)
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
    tl.store(sum_at + 2 * programs, valid_sum)
    tl.store(sum_at + 3 * programs, wrong_sum)
    tl.store(wrong_labels + tl.program_id(0), lowest)


def cross_entropy(
    call: CrossEntropyCall, logits: Tensor, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Fills the gradient; the partial sums (4, programs) and each program's lowest wrong label."""
    classes = logits.shape[1]
    block, warps, tiles = blocks_for(classes, logits.itemsize, 2)
    written = logits if gradient is None else gradient
    pixels = describe([logits, written], [call.labels, call.pixel_weight], block)
    partials = logits.new_empty((4, pixels.programs()), dtype=torch.float32)
    wrong_labels = logits.new_empty(pixels.programs(), dtype=torch.int64)
    with device_of(logits):
        cross_entropy_kernel[(pixels.programs(),)](
            logits,
            pixels.strides[0],
            written,
            pixels.strides[1],
            call.labels,
            pixels.strides[2],
            call.pixel_weight,
            pixels.strides[3],
            call.class_weight,
            partials,
            wrong_labels,
            pixels.sizes,
            pixels.blocks,
            call.ignore_index,
            call.smoothing,
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
    return partials, wrong_labels
