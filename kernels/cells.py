"""Up-sampling that never happens: how output pixels are shared out, and gradients put together.

A program walks down a strip of output columns through a band, the output rows between two
low-resolution ones. It holds these two rows at its columns, and the gradients of both, which go to
a scratch at low resolution. A second kernel adds up what the programs left for each low-resolution
pixel in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from fastmt.kernels.columns import MAX_FLOATS, MAX_WARPS, threads_of, tiles_of
from fastmt.kernels.grid import Grid, Layout, first_beyond, grid_of, neighbours
from fastmt.kernels.launch import GIVEN, Launch
from fastmt.kernels.views import NARROW, REMEMBERED

ROWS = 6  # columns of a band: two of the student, two of the teacher, two of the gradient
WINDOW = 16  # low-resolution columns that a matrix product makes at once
JOINED = 1024  # low-resolution gradients of one program
# Of a strip in one piece: the product that shares out gradients takes 96 KiB of shared memory for
# 320 classes, of 99 KiB that the GPUs of compute capability 8.6 and 8.9 have.
PRODUCT_CLASSES = 320
# Triton before 3.7 takes more registers: at 21 classes it would spill (sm_90).
ROOM = MAX_FLOATS if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 160


class Strips(NamedTuple):
    """How a strip is walked: in one piece, unless its classes do not fit into the registers."""

    pixels: int  # across a strip
    piece: int  # pixels of it at once
    warps: int
    tiles: tuple[int, ...]  # heights of the tiles of its columns


def strips_for(classes: int, columns: float, gradient: bool = True) -> Strips:
    """The strip for an operation that holds `columns` at once, at least 16 pixels wide.

    The wider a strip, the less scratch its gradients take; the narrower a piece, the more classes
    there is room for. Pieces have half the room: the compiler keeps every class's address from one
    to the next.
    """
    most = int(ROOM / columns)
    warps = 1
    while classes * 16 > most * 32 * warps and warps < MAX_WARPS:
        warps *= 2
    room = most * 32 * warps
    pixels = 32 if classes * 32 <= room else 16
    piece = pixels // 2 if gradient and classes > PRODUCT_CLASSES else pixels
    while piece > 1 and classes * piece > (room if piece == pixels else room // 2):
        piece //= 2
    return Strips(pixels, piece, warps, tiles_of(classes, max(threads_of(warps) // piece, 1)))


class Walk(NamedTuple):
    """Programs over (images, bands, strips) and the scratch that their gradients take."""

    first: Grid  # what the bands are made of, and gets the gradient
    others: tuple[Grid, ...]
    size: tuple[int, int]
    images: int
    bands: int
    strips: int
    span: int  # low-resolution columns that a strip touches

    @property
    def programs(self) -> int:
        return self.images * self.bands * self.strips

    def scratch(self, logits: Tensor, strip: Strips) -> Tensor:
        """Room for the gradients of every strip; 0 where its pieces are to be added up."""
        new = logits.new_empty if strip.piece == strip.pixels else logits.new_zeros
        return new((self.programs, 2, logits.shape[1], self.span), dtype=torch.float32)

    def wide(self, classes: int, *maps: Tensor | None) -> bool:
        """Whether offsets within an image's row, or positions on an axis, need 64 bits."""
        strides = tuple(0 if m is None else m.stride(2) for m in maps)
        return _reach(self, classes, strides) >= NARROW


@functools.lru_cache(REMEMBERED)
def _reach(walk: Walk, classes: int, maps: tuple[int, ...]) -> int:
    """The largest offset within a row, or position on an axis."""
    grids = (walk.first, *walk.others)
    offsets = [classes * abs(s[1]) + axis[0] * abs(s[3]) for _, axis, s in grids]
    offsets += [walk.size[1] * abs(stride) for stride in maps]
    offsets += [
        (out + 1) * axis[1] + axis[0] * axis[3]
        for grid in grids
        for axis, out in zip(grid[:2], walk.size, strict=True)
    ]
    return max(offsets)


def walk_of(
    first: Tensor, others: list[Tensor], size: tuple[int, int], align_corners: bool, pixels: int
) -> Walk:
    layouts = tuple((other.shape, other.stride()) for other in others)
    return _walk((first.shape, first.stride()), layouts, size, align_corners, pixels)


@functools.lru_cache(REMEMBERED)
def _walk(
    first: Layout,
    others: tuple[Layout, ...],
    size: tuple[int, int],
    align_corners: bool,
    pixels: int,
) -> Walk:
    images, _, height, width = first[0]
    strips = triton.cdiv(size[1], pixels)
    grid = grid_of(first, size, align_corners)
    _, step, _, unit = grid[1]
    span = min((pixels - 1) * step // unit + 3, width)
    grids = tuple(grid_of(other, size, align_corners) for other in others)
    return Walk(grid, grids, size, images, height, strips, span)


def precision(warps: int) -> str:
    """Of the products that share out gradients: tensor cores where they reach float32.

    Not those that four warps of a Blackwell take, by way of tensor memory: they spill and take
    more instructions than the products themselves.
    """
    if not isinstance(join_kernel, triton.JITFunction):
        return "ieee"
    target = driver.active.get_current_target()
    if target.backend != "cuda" or target.arch < 80 or (target.arch >= 100 and warps >= 4):
        return "ieee"
    return "tf32x3"


@triton.jit
def strip_of(strips, bands, STRIP: tl.constexpr, WIDE: tl.constexpr):
    """(image, band, first output column) of this program; 64-bit if WIDE, but the image always."""
    program = tl.program_id(0)
    begin = (program % strips) * STRIP
    row = program // strips
    band = row % bands
    if WIDE:
        begin, band = begin.to(tl.int64), band.to(tl.int64)
    return (row // bands).to(tl.int64), band, begin


@triton.jit
def map_row(data, strides, image, row, columns, inside):
    """Values of an optional map (N, H, W) in an output row; 1 where there is no map."""
    if data is None:
        return tl.full(columns.shape, 1.0, tl.float32)
    else:
        at = data + image * strides[0] + row.to(tl.int64) * strides[1]
        return tl.load(at + columns * strides[2], mask=inside, other=0)


@triton.jit
def join_kernel(
    scratch,
    gradient,
    strides,
    columns,
    out_width,
    height,
    strips,
    span,
    spread,
    CLASSES: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradient of each low-resolution pixel: the parts of the strips and bands around it."""
    width = columns[0]
    if WIDE:  # one row may have that many values
        width = width * tl.full((), 1, tl.int64)
    in_row = tl.cdiv(CLASSES * width, BLOCK)
    row = tl.program_id(0) // in_row
    index = (tl.program_id(0) % in_row) * BLOCK + tl.arange(0, BLOCK)
    image = (row // height).to(tl.int64)
    y = row % height
    inside = index < CLASSES * width
    c = index // width
    x = index % width
    begin = first_beyond(x - 1, columns, out_width)
    end = first_beyond(x + 1, columns, out_width)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(spread):
        strip = begin // PIXELS + i
        here = inside & (strip * PIXELS < end) & (end > begin)
        first, _ = neighbours(strip * PIXELS, columns)
        part = scratch + c * span + x - first
        program = (image * height + y) * strips + strip
        total += tl.load(part + 2 * program * (CLASSES * span), mask=here, other=0.0)
        program -= strips  # of the band above, where this row is the lower one
        at = part + (2 * program + 1) * (CLASSES * span)
        total += tl.load(at, mask=tl.where(y > 0, here, False), other=0.0)
    to = gradient + image * strides[0] + y.to(tl.int64) * strides[2]
    to += c.to(tl.int64) * strides[1] + x * strides[3]
    tl.store(to, total.to(gradient.dtype.element_ty), mask=inside)


def prepare_join(walk: Walk, gradient: Tensor, pixels: int, wide: bool) -> Launch:
    """The launch that fills a gradient (N, C, height, width): it is given (scratch, gradient)."""
    images, classes, height, width = gradient.shape
    _, step, _, unit = walk.first[1]
    touching = walk.size[1] if width == 1 else 5 * unit // (2 * step) + 2  # columns that touch one
    spread = min((touching + pixels - 2) // pixels + 1, walk.strips)
    return Launch(
        join_kernel,
        images * height * triton.cdiv(classes * width, JOINED),
        GIVEN,
        GIVEN,
        gradient.stride(),
        walk.first[1],
        walk.size[1],
        height,
        walk.strips,
        walk.span,
        spread,
        CLASSES=classes,
        PIXELS=pixels,
        BLOCK=JOINED,
        WIDE=wide,
    )
