"""softmax_confidence of logits at output resolution. Mirrors reference.softmax_confidence."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastmt.kernels.columns import blocks_for, classes_of, lanes_of
from fastmt.kernels.launch import GIVEN, Launch
from fastmt.kernels.teachers import dense_teacher
from fastmt.kernels.views import describe, inside_of, lie_apart, pixels_at, place_of

LEAST = 32  # pixels in half precision, 64 bytes in a row; fewer are slower (benchmarks/gpu_choice)


@triton.jit
def confidence_kernel(
    teachers,
    score,
    label,
    sizes,
    strides,
    inverse_temperature,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    lanes = lanes_of(BLOCK, VECTOR, WIDE)
    classes = classes_of(TILES, WIDE)
    place = place_of(tl.program_id(0), sizes, BLOCK)
    inside = inside_of(place, lanes, sizes, WHOLE)
    value, best, _ = dense_teacher(
        teachers,
        strides,
        place,
        lanes,
        classes,
        inside,
        inverse_temperature,
        0,
        KIND,
        CLASSES,
    )
    tl.store(pixels_at(score, strides[-2], place, lanes), value, mask=inside)
    at = pixels_at(label, strides[-1], place, lanes)
    tl.store(at, best.to(tl.int64), mask=inside)


def prepare(logits: Sequence[Tensor], kind: str, score: Tensor) -> Launch:
    """The launch that fills score (N, *spatial) float32 and label (N, *spatial) int64.

    Both lie like `score` does. It is given (logits, score, label, inverse_temperature).
    """
    classes = logits[0].shape[1]
    itemsize, apart = min(t.itemsize for t in logits), lie_apart(logits)
    columns = 2
    if itemsize == 2 and len(logits) == 1:  # room for 8 pixels in a thread, where 4 are faster
        few = blocks_for(classes, itemsize, columns).pixels < LEAST
        columns = 1 if apart or few else columns
    block, warps, tiles, vector = blocks_for(classes, itemsize, columns, apart)
    if (
        itemsize == 2 and len(logits) == 1 and (vector, block) == (4, 128)
    ):  # 19 classes on an H200: 100 us, not 114
        block, vector = 64, 2
    pixels = describe(logits, [score, score], block)
    return Launch(
        confidence_kernel,
        pixels.blocks,
        GIVEN,
        GIVEN,
        GIVEN,
        pixels.sizes,
        pixels.strides,
        GIVEN,
        KIND=kind,
        CLASSES=classes,
        TILES=tiles,
        BLOCK=block,
        VECTOR=vector,
        WIDE=pixels.wide,
        WHOLE=pixels.whole,
        num_warps=warps,
        num_stages=1,
    )
