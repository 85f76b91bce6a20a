"""The denominator of a cross-entropy from its labels alone, before the logits are read.

The gradient is then written as it is handed out. Found together with the loss, the denominator
comes too late for that, and the backward pass has to read and write all of the gradient again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmt.kernels.calls import CrossEntropyCall
from fastmt.kernels.columns import classes_of, lanes_of
from fastmt.kernels.labels import class_weights, label_weight
from fastmt.kernels.launch import GIVEN, Launch
from fastmt.kernels.sums import Total, partial_sums, pick, ratio, sums_of_all
from fastmt.kernels.views import describe, inside_of, map_at, place_of
from fastmt.kernels.weights import put_count, put_sum

PIXELS, WARPS = 4096, 8  # of a block
LAUNCHES = 2**24  # bytes: about what two small launches may cost, by count and not by time


def denominator_pays(call: CrossEntropyCall, gradient: Tensor) -> bool:
    """Whether a gradient is better off without a pass of its own.

    float16 is scaled in the end, or it would drown in the subnormals (sums.GradientScale).
    """
    if call.total["NORMALIZE"] == "all" or gradient.dtype == torch.float16:
        return False
    maps = [m.nbytes for m in (call.labels, call.pixel_weight) if m is not None]
    return 2 * gradient.nbytes >= sum(maps) + LAUNCHES


@triton.jit
def cross_entropy_weight_kernel(
    labels,
    pixel_weight,
    class_weight,
    partials,
    sizes,
    strides,
    ignore_index,
    smoothing,
    CLASSES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """This program's part of the sum of weights and of the number of valid pixels."""
    lanes = lanes_of(BLOCK, 16, WIDE)
    _, _, spread = class_weights(class_weight, classes_of(TILES, False), smoothing, CLASSES)
    place = place_of(tl.program_id(0), sizes, BLOCK)
    inside = inside_of(place, lanes, sizes, WHOLE)
    given = map_at(labels, strides[0], place, lanes, inside).to(tl.int64)
    factor = map_at(pixel_weight, strides[1], place, lanes, inside)
    _, keep, _, weight, own_weight = label_weight(
        given, inside, factor, ignore_index, class_weight, spread, CLASSES
    )
    put_sum(partials, 0, tl.where(weight != 0.0, weight * own_weight, 0.0).to(tl.float64))
    put_sum(partials, 1, keep.to(tl.int32))
    put_count(partials, 2)


@triton.jit
def cross_entropy_denominator_kernel(
    partials,
    programs,
    shares,
    inside,
    COUNT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 / denominator, from (weight, valid) of each program."""
    totals, has_all = sums_of_all(partials, programs, shares, COUNT, BLOCK)
    if has_all:
        denominator = pick(totals, 1 if NORMALIZE == "valid" else 0)
        tl.store(inside, ratio(1.0, denominator))


def prepare_denominator(call: CrossEntropyCall, classes: int) -> Callable[..., Tensor]:
    """What gives 1 / denominator, a float64 on the device, for labels, weights and results."""
    maps = [m.unsqueeze(1) for m in (call.labels, call.pixel_weight) if m is not None]
    pixels = describe(maps, (), PIXELS)
    weigh = Launch(
        cross_entropy_weight_kernel,
        pixels.blocks,
        *[GIVEN] * 4,
        pixels.sizes,
        (pixels.strides[0], pixels.strides[-1]),
        call.ignore_index,
        GIVEN,
        CLASSES=classes,
        TILES=(triton.next_power_of_2(classes),),
        BLOCK=PIXELS,
        WIDE=pixels.wide,
        WHOLE=pixels.whole,
        num_warps=WARPS,
    )
    kernel, normalize = cross_entropy_denominator_kernel, call.total["NORMALIZE"]
    divide = Total(kernel, 2, pixels.blocks, GIVEN, NORMALIZE=normalize)

    def denominator(labels, pixel_weight, class_weight, smoothing, results) -> Tensor:
        partials = partial_sums(results, 2, pixels.blocks, dtype=torch.float64)
        inside = torch.empty_like(results[0], dtype=torch.float64)
        weigh(labels, pixel_weight, class_weight, partials, smoothing)
        divide(partials, inside)
        return inside

    return denominator
