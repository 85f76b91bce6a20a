"""The kernels of a GPU for tests that make their tensors on the CPU.

Operands are moved as they lie, with their strides, offsets and alignments.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

GPU = torch.device("cuda", 0)
NAMES = (
    *("consistency_loss", "cross_entropy", "softmax_confidence", "scale_", "ema_update_"),
    *("resample_slices", "resample_slices_backward"),
)
ITEMSIZES = (4, 2, 2, 1)  # of the types in a table of moving averages


class OnGpu:
    """Operations by the names and signatures of csrc/library.cpp, for CPU tensors, on a GPU."""

    def __init__(self, operations: Any) -> None:
        self._operations = operations

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._operations, name)
        return functools.partial(_answered, operation) if name in NAMES else operation

    def scale_(self, data: Tensor, scale: Tensor, factor: Tensor) -> None:
        moved = move(data, GPU)
        self._operations.scale_(moved, move(scale, GPU), move(factor, GPU))
        data.copy_(moved)

    def ema_update_(
        self, table: Tensor, starts: Tensor, decays: Tensor, draws: Tensor | None = None
    ) -> None:
        """The memory behind each address of the table is moved there, and what is written back."""
        rows, moved = table.tolist(), []
        for row in rows:
            for column, kind in ((0, row[3]), (1, row[4]), (8, row[3])):
                size = row[2] * ITEMSIZES[kind]
                if size and row[column]:
                    here = memory_at(row[column], size)
                    moved.append((here, _as_aligned(here, row[column]), column != 1))
                    row[column] = moved[-1][1].data_ptr()
        there = torch.tensor(rows, dtype=table.dtype).view(table.shape).to(GPU)
        self._operations.ema_update_(there, *move([starts, decays, draws], GPU))
        for here, copy, is_written in moved:
            if is_written:
                here.copy_(copy)


def _answered(operation: Any, *arguments: Any) -> Any:
    return move(operation(*move(list(arguments), GPU)), torch.device("cpu"))


def move(value: Any, device: torch.device) -> Any:
    """Tensors, also in lists and tuples, as they lie in a copy of their memory on a device."""
    if isinstance(value, (list, tuple)):
        return type(value)(move(each, device) for each in value)
    if not isinstance(value, Tensor):
        return value
    value = value.detach().resolve_neg()
    reach = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
    offset = value.storage_offset()
    whole = value.as_strided((offset + reach if value.numel() else offset,), (1,), 0)
    return whole.to(device, copy=True).as_strided(value.shape, value.stride(), offset)


def memory_at(address: int, size: int) -> Tensor:
    """Bytes of the CPU's memory, not copied."""
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


def _as_aligned(here: Tensor, address: int) -> Tensor:
    """A copy on the GPU whose address is as far from a multiple of 16."""
    there = torch.empty(len(here) + 16, dtype=torch.uint8, device=GPU)
    begin = (address - there.data_ptr()) % 16
    return there[begin : begin + len(here)].copy_(here)
