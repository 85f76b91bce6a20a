"""Output pixels and the tensors over them, as the dense kernels walk them; where a kernel runs."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NARROW = 2**31  # offsets within a block below this are 32-bit
OUTER = 3  # dimensions of pixels around the inner one
_CURRENT = contextlib.nullcontext()
REMEMBERED = 1024  # descriptions of layouts; training asks for the same few at every step


class Pixels(NamedTuple):
    """Pixels (N, *spatial), dimensions merged where every tensor allows it, in blocks of a row.

    Each tensor has strides of its own, also where tensors lie in memory alike: a kernel that takes
    them as one keeps the offsets of every class in registers from the first tensor to the last.
    """

    sizes: tuple[int, ...]  # OUTER sizes, with ones at their end, and the inner one
    strides: tuple[tuple[int, ...], ...]  # of a tensor: its class stride, one for each size
    blocks: int
    reach: int  # the largest offset within a block
    whole: bool  # every block is full

    @property
    def wide(self) -> bool:
        """Whether offsets within a block need 64 bits."""
        return self.reach >= NARROW


def describe(columns: Sequence[Tensor], maps: Sequence[Tensor | None], block: int) -> Pixels:
    """Pixels of tensors (N, C, *spatial) and maps (N, *spatial); None has strides of 0."""
    shape = columns[0].shape
    none = (0,) * (len(shape) - 1)
    return _pixels(
        shape,
        tuple(tensor.stride() for tensor in columns),
        tuple(none if m is None else m.stride() for m in maps),
        block,
    )


@functools.lru_cache(REMEMBERED)
def _pixels(
    shape: tuple[int, ...],
    columns: tuple[tuple[int, ...], ...],
    maps: tuple[tuple[int, ...], ...],
    block: int,
) -> Pixels:
    rows = [(images, *spatial) for images, _, *spatial in columns]
    sizes, merged = merge((shape[0], *shape[2:]), [*rows, *maps])
    lead = OUTER + 1 - len(sizes)
    if lead < 0:
        raise ValueError(f"more than {OUTER + 1} dimensions of pixels that cannot be merged")
    class_strides = [stride for _, stride, *_ in columns] + [0] * len(maps)
    # Sizes of 1 come before the inner one: Triton knows them, so place_of divides by none of them.
    ones, none = (1,) * lead, (0,) * lead
    strides = tuple(
        (c, *row[:-1], *none, row[-1]) for c, row in zip(class_strides, merged, strict=True)
    )
    blocks = math.prod(sizes[:-1]) * triton.cdiv(sizes[-1], block)
    reach = [(shape[1] - 1) * abs(c) + block * abs(inner) for c, *_, inner in strides]
    whole = sizes[-1] % block == 0
    return Pixels((*sizes[:-1], *ones, sizes[-1]), strides, blocks, max(reach), whole)


def lie_apart(columns: Sequence[Tensor]) -> bool:
    """Whether neighbouring pixels of any tensor (N, C, *spatial) do not lie side by side."""
    first = columns[0]
    inner = next((d for d in (*range(first.ndim - 1, 1, -1), 0) if first.shape[d] != 1), 0)
    return any(tensor.stride(inner) != 1 for tensor in columns)


def merge(shape: Sequence[int], rows: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Sizes and strides without the dimensions of one pixel or that continue the one before."""
    kept = [d for d, size in enumerate(shape) if size != 1] or [len(shape) - 1]
    sizes, strides = [shape[kept[0]]], [[row[kept[0]]] for row in rows]
    for d in kept[1:]:
        pairs = list(zip(strides, rows, strict=True))
        if all(outer[-1] == row[d] * shape[d] for outer, row in pairs):
            sizes[-1] *= shape[d]
            for outer, row in pairs:
                outer[-1] = row[d]
        else:
            sizes.append(shape[d])
            for outer, row in pairs:
                outer.append(row[d])
    return sizes, strides


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _CURRENT


@triton.jit
def blocks_in(size, BLOCK: tl.constexpr):
    """So many blocks hold at least one element; tl.cdiv(size, BLOCK) would overflow near 2^31."""
    return (size - 1) // BLOCK + 1


@triton.jit
def place_of(block, sizes, BLOCK: tl.constexpr):
    """Where a block begins, one index for each size."""
    in_row = blocks_in(sizes[3], BLOCK)
    row = block // in_row
    first = (block % in_row).to(tl.int64) * BLOCK
    middle = row // sizes[2]
    return (
        (middle // sizes[1]).to(tl.int64),
        (middle % sizes[1]).to(tl.int64),
        (row % sizes[2]).to(tl.int64),
        first,
    )


@triton.jit
def inside_of(place, lanes, sizes, WHOLE: tl.constexpr):
    """Which lanes of a block are pixels; where all blocks are full, nothing is masked."""
    if WHOLE:
        return tl.full(lanes.shape, True, tl.int1)
    else:
        return place[3] + lanes < sizes[3]


@triton.jit
def pixels_at(data, strides, place, lanes):
    """Pointers to the pixels of a block, at class 0."""
    base = data + place[0] * strides[1] + place[1] * strides[2] + place[2] * strides[3]
    return base + place[3] * strides[4] + lanes * strides[4]


@triton.jit
def map_at(data, strides, place, lanes, inside):
    """Values of an optional map at the pixels of a block; 1 where there is no map."""
    if data is None:
        return tl.full(lanes.shape, 1.0, tl.float32)
    else:
        return tl.load(pixels_at(data, strides, place, lanes), mask=inside, other=0)
