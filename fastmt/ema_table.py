"""Pairs of tensors as a launch on a device reads them: a table of their addresses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmt.ema_bound import AVERAGE, COPY, KERNEL_DTYPES, Row, is_dense, is_plain

try:  # what torch.compile tells with that its guards hold: in C++, ten times as fast as in Python
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

CHUNK = 16 * 1024  # elements in one piece of work, as in csrc and in kernels/ema.py
TYPES = {dtype: index for index, dtype in enumerate(KERNEL_DTYPES)}  # as in csrc/cpu/calls.h
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # of torch._foreach
_MAX_TABLES = 8
_tables: OrderedDict[tuple[int, ...], Lists] = OrderedDict()
_captured: set[Lists] = set()  # whose tables a CUDA graph reads, nobody can tell until when


def is_read_by(backend: str, on_host: bool) -> bool:
    """Whether the kernels of a backend find tensors by a table; on the host C++ holds them."""
    return backend == "triton" or (backend == "cpp" and not on_host)


def are_on_host(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.is_cpu for tensor in tensors)


def kernel_serves(average: Tensor, value: Tensor) -> bool:
    """Whether the kernel can walk both tensors as one stretch of memory."""
    same_memory_order = average.stride() == value.stride() or (
        average.is_contiguous() and value.is_contiguous()
    )
    return (
        average.dtype in TYPES
        and value.dtype in TYPES
        and average.device == value.device
        and same_memory_order
        and is_dense(average)
        and is_plain(average)
        and is_plain(value)
    )


def _check_memory(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Refuse dense tensors whose storage was freed or cut, before an address of them is used."""
    for pair in pairs:
        for name, tensor in zip(("teacher", "student"), pair, strict=True):
            end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
            held = tensor.untyped_storage().nbytes()
            if end > held:
                raise ValueError(f"{name}: its storage holds {held} bytes, expected {end}")


class Table:
    """Addresses of tensor pairs on one device, and what shows that they still hold."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> None:
        """pairs: that kernel_serves, on `device`."""
        _check_memory(pairs)
        rows = [
            (t.data_ptr(), s.data_ptr(), t.numel(), TYPES[t.dtype], TYPES[s.dtype])
            for t, s in pairs
        ]
        table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)
        chunks = (table[:, 2] + CHUNK - 1) // CHUNK
        self.rows = table.to(device)
        self.starts = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)]).to(device)

    def update(self, kernels: Any, decay: Tensor) -> None:
        """One launch; decay is a 0-dim float64 tensor on the device."""
        kernels.ema_update_(self.rows, self.starts, decay)


class Layout:
    """Where tensors lie and how, to be compared with what is given later."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._same = _layout_check(list(tensors))

    def is_that_of(self, tensors: Sequence[Tensor]) -> bool:
        return (
            len(tensors) == len(self._addresses)
            and self._addresses == list(map(Tensor.data_ptr, tensors))
            and self._same(*tensors)
        )


class DeviceUpdate:
    """What one teacher takes from its student on a GPU, in few launches for any number of tensors.

    One averages, one copies floating point tensors, three copy integers, and a few make the decays
    of these, each of one number. `rest` is not served.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        """rows: of one teacher each."""
        here = [row for row in rows if _is_on(row, device)]
        served = {
            mode: [row for row in here if row.modes[0] == mode and kernel_serves(*_pair(row))]
            for mode in (AVERAGE, COPY)
        }
        integers = [row for row in here if _is_copied_integer(row)]
        taken = {id(row) for row in (*served[AVERAGE], *served[COPY], *integers)}
        self.rest = [row for row in rows if id(row) not in taken]
        pairs = [_pair(row) for mode in (AVERAGE, COPY) for row in served[mode]]
        self._tensors = [tensor for pair in pairs for tensor in pair]
        self._layout = Layout(self._tensors)
        self._averaged, self._copied = (
            Table(list(map(_pair, served[mode])), device) for mode in (AVERAGE, COPY)
        )
        self._integers = [row.averages[0] for row in integers], [row.value for row in integers]

    def holds(self) -> bool:
        """Whether all tensors lie where they did."""
        return self._layout.is_that_of(self._tensors)

    def run(self, kernels: Any, decay: Tensor) -> None:
        """Update all but the rest by a 0-dim float64 tensor, negative to change nothing."""
        left_out = decay < 0
        self._averaged.update(kernels, torch.where(left_out, 1.0, decay))
        if len(self._copied.rows):
            self._copied.update(kernels, left_out.to(torch.float64))
        averages, values = self._integers
        if averages:
            missing = torch._foreach_sub(values, averages)
            torch._foreach_mul_(missing, (~left_out).to(torch.int64))
            torch._foreach_add_(averages, missing)


class Lists:
    """The table of two lists of tensors, and the positions of what it leaves out."""

    def __init__(
        self, teacher: list[Tensor], student: list[Tensor], positions: Sequence[int]
    ) -> None:
        device = next((t.device for t in teacher if t.dtype in TYPES), torch.device("cpu"))
        fits = {i for i in positions if kernel_serves(teacher[i], student[i])}
        fits = {i for i in fits if teacher[i].device == device}
        self.table = Table([(teacher[i], student[i]) for i in sorted(fits)], device)
        self.rest = [i for i in positions if i not in fits]
        self.layout = Layout([*teacher, *student])


def lists(
    teacher: list[Tensor], student: list[Tensor], positions: Callable[..., Sequence[int]]
) -> Lists:
    """The table of two lists, from the last few; `positions` of a new one are checked first."""
    key = (len(teacher), *(tensors[0].data_ptr() for tensors in (teacher, student) if tensors))
    table = _tables.get(key)
    if table is None or not table.layout.is_that_of([*teacher, *student]):
        table = _tables[key] = Lists(teacher, student, positions(teacher, student))
    if is_capturing():
        _captured.add(table)
    _tables.move_to_end(key)
    if len(_tables) > _MAX_TABLES:
        _tables.popitem(last=False)
    return table


def is_capturing() -> bool:
    """Whether what the current stream is given becomes part of a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def decay_on(device: torch.device, decay: float | Tensor) -> Tensor:
    """0-dim float64, where the kernels read it."""
    if not isinstance(decay, Tensor):
        return torch.full((), decay, dtype=torch.float64, device=device)
    return decay.detach().to(device, torch.float64, non_blocking=True)


def _pair(row: Row) -> tuple[Tensor, Tensor]:
    return row.averages[0], row.value


def _is_on(row: Row, device: torch.device) -> bool:
    return all(is_plain(tensor) and tensor.device == device for tensor in _pair(row))


def _is_copied_integer(row: Row) -> bool:
    average, value = _pair(row)
    return row.modes[0] == COPY and average.dtype == value.dtype and average.dtype in _INTEGERS


def _layout_check(tensors: list[Tensor]) -> Callable[..., bool]:
    """A function that tells whether other tensors have the dtypes, sizes and strides of these."""
    expected = list(map(_layout, tensors))

    def holds(*others: Tensor) -> bool:
        return expected == list(map(_layout, others))

    if not tensors or TensorGuards is None:
        return holds
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    same = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    # The guards also ask what does not matter here: autocast, inference mode, requires_grad.
    return lambda *others: same(*others) or holds(*others)


def _layout(tensor: Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.dtype, tensor.shape, tensor.stride()
