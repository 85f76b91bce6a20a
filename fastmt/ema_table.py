"""Pairs of tensors as a launch on a device reads them: a table of their addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmt.ema_bound import AVERAGE, COPY, KEEP, KERNEL_DTYPES, Rest, Row, is_dense, is_plain
from fastmt.ema_layout import unmoved
from fastmt.rounding import HALVES, mixed

CHUNK = 16 * 1024  # elements in one piece of work, as in csrc and in kernels/ema.py
COLUMNS = 9  # of a table
TYPES = {dtype: index for index, dtype in enumerate(KERNEL_DTYPES)}  # as in csrc/cpu/calls.h
_BYTES = len(TYPES)  # the type of what is copied as it is


def is_read_by(backend: str, on_host: bool) -> bool:
    """Whether the kernels of a backend find tensors by a table; on the host C++ holds them."""
    return backend == "triton" or (backend == "cpp" and not on_host)


def are_on_host(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.is_cpu for tensor in tensors)


class Entry(NamedTuple):
    """A pair of the table."""

    average: Tensor
    value: Tensor
    teacher: int = 0  # whose decay and draw are its
    copies: bool = False  # whatever that decay, unless it is negative
    rounding: int = AVERAGE  # STOCHASTIC or KAHAN: how an average in half precision moves
    number: int = 0  # of the random numbers
    lost: Tensor | None = None  # by the rounding, where it is KAHAN

    @property
    def is_bytes(self) -> bool:
        return self.copies and self.average.dtype == self.value.dtype

    @property
    def rounds(self) -> bool:
        return self.rounding != AVERAGE

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.average, self.value, self.lost) if tensor is not None]

    def is_served(self, device: torch.device) -> bool:
        """Whether the kernel can walk all its tensors as one stretch of memory."""
        average, *others = tensors = self.tensors
        return (
            all(map(is_plain, tensors))
            and all(tensor.device == device for tensor in tensors)
            and (self.is_bytes or {average.dtype, self.value.dtype} <= TYPES.keys())
            and (not self.rounds or average.dtype in HALVES)
            and (self.lost is None or self.lost.dtype == average.dtype)
            and all(_are_in_one_order(average, other) for other in others)
            and is_dense(average)
        )

    def row(self) -> tuple[int, ...]:
        """As csrc/cpu/ema.cpp and kernels/ema.py read it, of COLUMNS numbers."""
        average, value = self[:2]
        length, types = average.numel(), (TYPES.get(average.dtype), TYPES.get(value.dtype))
        if self.is_bytes:
            length, types = length * average.itemsize, (_BYTES, _BYTES)
        mode = COPY if self.copies else self.rounding
        lost = 0 if self.lost is None else self.lost.data_ptr()
        addresses = average.data_ptr(), value.data_ptr()
        return *addresses, length, *types, self.teacher, mode, mixed(self.number), lost


def _are_in_one_order(one: Tensor, other: Tensor) -> bool:
    return one.stride() == other.stride() or (one.is_contiguous() and other.is_contiguous())


def _check_memory(entries: Sequence[Entry]) -> None:
    """Refuse dense tensors whose storage was freed or cut, before an address of them is used."""
    for entry in entries:
        for name, tensor in zip(
            ("teacher", "student", "compensation"), entry.tensors, strict=False
        ):
            end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
            held = tensor.untyped_storage().nbytes()
            if end > held:
                raise ValueError(f"{name}: its storage holds {held} bytes, expected {end}")


class Table:
    """Addresses of tensor pairs on one device, and what shows that they still hold."""

    def __init__(self, entries: Sequence[Entry], device: torch.device) -> None:
        """entries: that are served on `device`."""
        _check_memory(entries)
        rows = list(map(Entry.row, entries))
        table = torch.tensor(rows, dtype=torch.int64).reshape(-1, COLUMNS)
        chunks = (table[:, 2] + CHUNK - 1) // CHUNK
        self.rows = table.to(device)
        self.starts = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)]).to(device)
        self.rounds = any(entry.rounds for entry in entries)
        self._made_on = _stream(self.rows.device)

    def update(self, kernels: Any, decays: Tensor, draws: Tensor | None = None) -> None:
        """One launch; decays (teachers,), or 0-dim of one, is float64 on the device.

        draws, as many of int64, where the table `rounds`.
        """
        kernels.ema_update_(self.rows, self.starts, decays, *([draws] if self.rounds else []))
        device = self.rows.device
        if _stream(device) != self._made_on and not is_capturing():
            # Once dropped, their memory is given to others on the stream that they were made on.
            for tensor in (self.rows, self.starts):
                tensor.record_stream(torch.cuda.current_stream(device))


class DeviceUpdate:
    """What teachers take from their student on a GPU, in one launch for any number of tensors.

    `rest`, pairs of a teacher's place and a row of it alone, is not served.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self.rest: list[tuple[int, Row]] = []
        entries = []
        for row in rows:
            for teacher, alone in enumerate(row.of_each()):
                (average,), (mode,), (lost,) = alone.averages, alone.modes, alone.compensations
                rounding = AVERAGE if mode == COPY else mode
                entry = Entry(average, row.value, teacher, mode == COPY, rounding, row.number, lost)
                if mode != KEEP and entry.is_served(device):
                    entries.append(entry)
                elif mode != KEEP:
                    self.rest.append((teacher, alone))
        self._unmoved = unmoved([tensor for entry in entries for tensor in entry.tensors])
        self._rest = Rest([row for _, row in self.rest])
        self._table = Table(entries, device)

    def holds(self) -> bool:
        """Whether all tensors lie where they did."""
        return self._unmoved() and self._rest.holds()

    def run(
        self, kernels: Any, decays: Sequence[Tensor], draws: Sequence[int | Tensor] = ()
    ) -> None:
        """Update all but the rest, by a 0-dim float64 tensor a teacher, negative to change nothing.

        One that holds 1 keeps what is averaged, whatever the student holds. The draws are read
        where anything rounds.
        """
        if self._table.rounds:
            device = self._table.rows.device
            drawn = _together([draw_on(device, draw) for draw in draws])
            self._table.update(kernels, _together(decays), drawn)
        else:
            self._table.update(kernels, _together(decays))


def _together(scalars: Sequence[Tensor]) -> Tensor:
    return scalars[0] if len(scalars) == 1 else torch.stack(list(scalars))


def _stream(device: torch.device) -> int:
    """What tells a GPU's current stream from others, as fast as that can be had."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def is_capturing() -> bool:
    """Whether what the current stream is given becomes part of a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def decay_on(device: torch.device, decay: float | Tensor) -> Tensor:
    """0-dim float64, where the kernels read it."""
    if not isinstance(decay, Tensor):
        return torch.full((), decay, dtype=torch.float64, device=device)
    return decay.detach().to(device, torch.float64, non_blocking=True)


def draw_on(device: torch.device, draw: int | Tensor) -> Tensor:
    """0-dim int64, where the kernels read it."""
    if not isinstance(draw, Tensor):
        return torch.full((), draw, dtype=torch.int64, device=device)
    return draw.to(device, torch.int64, non_blocking=True)
