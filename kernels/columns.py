"""Blocks of pixels with all their classes in registers: how they are shared out, read and written.

A block is as many consecutive pixels as let the columns of all networks stay in registers, so that
each logit is read once. With one warp to a block, a thread reads a few neighbouring pixels at a
time, and a sum over the classes takes few exchanges between threads or none, no shared memory and
no barrier.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastmt.kernels.halves import COMPILED, widened
from fastmt.kernels.launch import target
from fastmt.kernels.views import pixels_at

MAX_FLOATS = 176  # that a thread holds of all its columns; 255 registers is the most it has
MAX_WARPS = 8
LINE = tl.constexpr(128)  # bytes that a prefetch brings to the second-level cache


class Blocks(NamedTuple):
    """Pixels in a block, warps that work on it, and heights of the tiles of its columns."""

    pixels: int
    warps: int
    tiles: tuple[int, ...]
    vector: int  # neighbouring pixels in a thread


def blocks_for(classes: int, itemsize: int, columns: float, apart: bool = False) -> Blocks:
    """The block for logits of `itemsize` bytes and an operation that holds `columns` at once.

    A thread takes 16 bytes at a time, but at most 4 pixels (8 bytes in half precision) where it
    holds two columns or more: then a thread has whole columns of 19 or 21 classes, with no padding
    and no exchange, and the registers that 8 pixels' own values would take. A warp still asks for
    256 bytes in a row, the same sectors; with 8 pixels "mse" of 19 classes takes 253 registers
    instead of 168 and 16 % longer (sm_90, benchmarks/gpu_choice).

    Where neighbouring pixels lie `apart` in memory (channels last, rows) every logit of a thread
    takes an address of its own: it has room for one pixel, and for a column less.
    """
    most = int(MAX_FLOATS / (columns + apart))  # logits of one column in a thread
    sector = 32 // itemsize  # pixels that memory hands over at once
    warps = 1
    while classes * sector > most * 32 * warps and warps < MAX_WARPS:
        warps *= 2
    pixels = 256
    while pixels > 1 and classes * pixels > most * 32 * warps:
        pixels //= 2
    if apart:
        pixels = min(pixels, 32 * warps)
    vector = 1 if apart else min(16 // itemsize, 4 if columns > 1 else 8, pixels)
    rows_at_once = max(threads_of(warps) * vector // pixels, 1)
    tiles = even_tiles_of if apart else tiles_of
    return Blocks(pixels, warps, tiles(classes, rows_at_once), vector)


def fetches(blocks: Blocks, itemsize: int) -> bool:
    """Whether logits that a kernel loads late are fetched before.

    On an H200 "mse" of 19 classes in bfloat16 takes 249 us instead of 268, 92 % of a copy's rate,
    cross-entropy 193 instead of 209: a block waits for memory twice, and there are too few of them
    to fill that time; with half a line to a row still (81 classes, 338 us instead of 378), with a
    quarter not (150 classes, 814 instead of 729). In float32 all wait for the bytes themselves.
    """
    rows_are_long = 2 * blocks.pixels * itemsize >= LINE.value
    on_cuda = (gpu := target()) is not None and gpu.backend == "cuda"
    return on_cuda and itemsize == 2 and blocks.vector > 1 and rows_are_long


def registers_for(blocks: Blocks, classes: int, itemsize: int) -> int | None:
    """The most registers that a thread may take of a multiprocessor on which 12 warps are to run.

    Of columns in half precision that fit into so many on the GPUs where that was measured; launch()
    holds a kernel to them that spills none. By the compiler's own choice, which changes with its
    version and with arguments that have little to do with it, some kernels get more: "mse" of 19
    classes took 291 us on an H200, and 257 with 168.
    """
    on_hopper = (gpu := target()) is not None and (gpu.backend, gpu.arch) == ("cuda", 90)
    return 168 if on_hopper and itemsize == 2 and blocks.vector * classes <= 96 else None


def threads_of(warps: int) -> int:
    """In so many warps of the GPU at hand: 32 in each, on AMD's for data centres 64."""
    gpu = target()
    return warps * (32 if gpu is None else gpu.warp_size)


def even_tiles_of(classes: int, rows_at_once: int) -> tuple[int, ...]:
    """As many tiles of one height as hold the classes, for pixels that lie apart.

    There neighbouring threads read neighbouring classes of a pixel: the more of them, the fewer
    lines of memory a warp asks for, and the more threads have to exchange. 4 is between the two;
    benchmarks/gpu_choice times others.
    """
    height = max(rows_at_once, min(4 if classes > 8 else 2, 1 << (classes - 1).bit_length()))
    while classes > 24 * height:  # what the compiler has to unroll
        height *= 2
    return (height,) * -(-classes // height)


def tiles_of(classes: int, rows_at_once: int) -> tuple[int, ...]:
    """At most three powers of two, highest first, that hold the classes; the last one is padded."""
    left = -(-classes // rows_at_once) * rows_at_once
    tiles: list[int] = []
    while left > 0:
        last = len(tiles) == 2
        height = 1 << ((left - 1).bit_length() if last else left.bit_length() - 1)
        tiles.append(height)
        left -= height
    return tuple(tiles)


@triton.jit
def lanes_of(BLOCK: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr):
    """The pixels of a block, (BLOCK,): VECTOR neighbours in a thread; 64-bit if WIDE."""
    # Both: a hint of contiguity alone leaves the claim that each of them is a multiple of BLOCK.
    lanes = tl.multiple_of(tl.max_contiguous(tl.arange(0, BLOCK), VECTOR), VECTOR)
    return lanes.to(tl.int64) if WIDE else lanes


@triton.jit
def classes_of(TILES: tl.constexpr, WIDE: tl.constexpr):
    """Which class each row of each tile is, (rows, 1)."""
    classes = ()
    first = 0
    for i in tl.static_range(len(TILES)):
        rows = (tl.arange(0, TILES[i]) + first)[:, None]
        classes = classes + (rows.to(tl.int64) if WIDE else rows,)
        first += TILES[i]
    return classes


@triton.jit
def load_column(data, strides, place, lanes, classes, inside, CLASSES: tl.constexpr):
    """Logits of a block in float32; -inf in the padding."""
    pointers = pixels_at(data, strides, place, lanes)
    column = ()
    for i in tl.static_range(len(classes)):
        mask = inside[None, :]
        if i == len(classes) - 1:
            mask = mask & (classes[i] < CLASSES)
        at = pointers[None, :] + classes[i] * strides[0]
        column = column + (widened(tl.load(at, mask=mask, other=float("-inf"))),)
    return column


@triton.jit
def fetch_column(
    data,
    strides,
    place,
    sizes,
    classes,
    FETCH: tl.constexpr,
    BLOCK: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Ask the second-level cache for a block of logits that is loaded when more is known of it."""
    if FETCH and COMPILED:
        line: tl.constexpr = LINE * 8 // data.dtype.element_ty.primitive_bitwidth
        step: tl.constexpr = line if line < BLOCK else BLOCK
        pixels = tl.minimum(place[3] + tl.arange(0, BLOCK // step) * step, sizes[3] - 1)
        row = data + place[0] * strides[1] + place[1] * strides[2] + place[2] * strides[3]
        for i in tl.static_range(len(classes)):
            at = row + tl.minimum(classes[i], CLASSES - 1) * strides[0]
            fetch(at + (pixels * strides[4])[None, :])


@triton.jit
def fetch(addresses):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [addresses.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_column(data, strides, place, lanes, classes, column, inside, CLASSES: tl.constexpr):
    pointers = pixels_at(data, strides, place, lanes)
    for i in tl.static_range(len(classes)):
        mask = inside[None, :]
        if i == len(classes) - 1:
            mask = mask & (classes[i] < CLASSES)
        at = pointers[None, :] + classes[i] * strides[0]
        tl.store(at, column[i].to(pointers.dtype.element_ty), mask=mask)
