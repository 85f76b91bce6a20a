"""softmax_confidence of logits at output resolution. Mirrors reference.softmax_confidence."""

from __future__ import annotations

import triton
import triton.language as tl
from fastmt.kernels.columns import blocks_for, classes_of
from fastmt.kernels.teachers import dense_teacher
from fastmt.kernels.views import describe, device_of, inside_of, pixels_at, place_of
from torch import Tensor


@triton.jit
def confidence_kernel(
    teachers,
    teacher_strides,
    score,
    score_strides,
    label,
    label_strides,
    sizes,
    blocks,
    inverse_temperature,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    classes = classes_of(TILES)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        place = place_of(block, sizes, BLOCK)
        inside = inside_of(place, sizes, BLOCK)
        value, best, _ = dense_teacher(
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
        tl.store(pixels_at(score, score_strides, place, BLOCK, WIDE), value, mask=inside)
        at = pixels_at(label, label_strides, place, BLOCK, WIDE)
        tl.store(at, best.to(tl.int64), mask=inside)


def confidence(
    logits: list[Tensor], kind: str, inverse_temperature: float, score: Tensor, label: Tensor
) -> None:
    """Fills score (N, *spatial) float32 and label (N, *spatial) int64."""
    classes = logits[0].shape[1]
    columns = min(len(logits), 2)
    block, warps, tiles = blocks_for(classes, min(t.itemsize for t in logits), columns)
    pixels = describe(logits, [score, label], block)
    with device_of(score):
        confidence_kernel[(pixels.programs(),)](
            tuple(logits),
            tuple(pixels.strides[: len(logits)]),
            score,
            pixels.strides[-2],
            label,
            pixels.strides[-1],
            pixels.sizes,
            pixels.blocks,
            inverse_temperature,
            KIND=kind,
            CLASSES=classes,
            TILES=tiles,
            BLOCK=block,
            WIDE=pixels.wide(classes, block),
            num_warps=warps,
            num_stages=1,
        )
