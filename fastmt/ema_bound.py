"""Tensors that are averaged again and again: bound once, checked and launched in one call."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastmt import native, reference

AVERAGE, COPY, KEEP, STOCHASTIC, KAHAN = range(5)  # as in csrc/cpu/calls.h
_ROUNDINGS = {AVERAGE: "nearest", STOCHASTIC: "stochastic", KAHAN: "kahan"}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels average
_PLAIN = (Tensor, nn.Parameter)


class Row(NamedTuple):
    """One value of the student, its average in each of K teachers, and what each does with it."""

    number: int  # tells its random numbers from those of other rows
    averages: tuple[Tensor, ...]
    value: Tensor
    modes: tuple[int, ...]
    compensations: tuple[Tensor | None, ...]  # of KAHAN: what rounding has lost

    def of_each(self) -> list[Row]:
        """The same for each teacher alone."""
        columns = self.averages, self.modes, self.compensations
        return [
            Row(self.number, (average,), self.value, (mode,), (lost,))
            for average, mode, lost in zip(*columns, strict=True)
        ]


class Bound:
    """Rows whose tensors the C++ side holds from one update to the next.

    It holds the tensors themselves, not their addresses: it reads each pointer, shape, stride and
    dtype anew at every update, so that whatever was exchanged since the last one is noticed. Only
    another thread that exchanges the memory of a tensor during an update is not. With `watch` it
    holds all but those of the first row, whose end can then tell that the others are to be let go.

    An update is holds(), and run() where that was True. Between them there is time for what needs
    the tensors' records, which the first brings near.
    """

    def __init__(self, rows: Sequence[Row], *, watch: bool = False) -> None:
        self._key = torch.ops.fastmt.ema_bind(
            [average for row in rows for average in row.averages],
            [row.value for row in rows],
            [mode for row in rows for mode in row.modes],
            [lost for row in rows for lost in row.compensations if lost is not None],
            [row.number for row in rows],
            watch,
        )
        teachers = len(rows[0].averages)
        self._decays, self._draws = (ctypes.c_double * teachers)(), (ctypes.c_int64 * teachers)()
        self._operands = self._key, *map(ctypes.addressof, (self._decays, self._draws))
        self._holds, self._run = native.ema_holds(), native.ema_run()
        weakref.finalize(self, torch.ops.fastmt.ema_release, self._key)

    def holds(self) -> bool:
        """Whether all tensors that are held have kept their layout; reads where they lie."""
        return self._holds(self._key)

    def run(self, decays: Sequence[float], draws: Sequence[int]) -> None:
        """Average, with a decay a teacher, by the addresses that holds() has read."""
        self._decays[:], self._draws[:] = decays, draws
        if not self._run(*self._operands):
            raise RuntimeError("the launch failed")

    def run_with(
        self, watched: Sequence[Tensor], decays: Sequence[float], draws: Sequence[int]
    ) -> bool:
        """run() with the first row; False, with nothing done, where its layout has changed."""
        return torch.ops.fastmt.ema_bound_run_.default(self._key, watched, decays, draws)


class Rest:
    """Rows that no launch takes, and whether they still are what was checked."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        tensors = (tensor for row in self.rows for tensor in (*row.averages, row.value))
        self._tensors = [t for t in tensors if not is_traceable_wrapper_subclass(t)]
        self._addresses = self._now()

    def _now(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))

    def holds(self) -> bool:
        """Whether the shapes fit, and no tensor lies elsewhere: it may share memory there."""
        return self._addresses == self._now() and all(map(_fits, self.rows))


def _fits(row: Row) -> bool:
    return all(average.shape == row.value.shape for average in row.averages)


def is_served(row: Row) -> bool:
    """Whether the launch takes a row: it walks each tensor as one stretch of memory on the CPU."""
    value, pairs = row.value, zip(row.averages, row.modes, strict=True)
    return (
        value.is_cpu
        and is_plain(value)
        and all(_follows(average, value, mode) for average, mode in pairs)
    )


def _follows(average: Tensor, value: Tensor, mode: int) -> bool:
    if not (average.is_cpu and is_plain(average)):
        return False
    floats = average.dtype in KERNEL_DTYPES and value.dtype in KERNEL_DTYPES
    if not floats and not (mode in (COPY, KEEP) and average.dtype == value.dtype):
        return False
    if average.is_contiguous() and value.is_contiguous():
        return True
    return average.stride() == value.stride() and is_dense(average)


def storage_of(tensor: Tensor) -> int:
    """Where its memory begins; of a subclass that is made of other tensors, the object itself."""
    if is_traceable_wrapper_subclass(tensor):
        return id(tensor)
    return tensor.untyped_storage().data_ptr()


def place_of(tensor: Tensor) -> int:
    """Where its first element lies."""
    return storage_of(tensor) + tensor.storage_offset() * tensor.itemsize


def is_plain(tensor: Tensor) -> bool:
    """No subclass, whose data the kernels would not know, nor what changes its sign when read."""
    lazy = tensor.is_neg() or tensor.is_conj()
    return type(tensor) in _PLAIN and not lazy


def has_kernels(tensor: Tensor) -> bool:
    """Whether there are kernels for tensors of its type and dtype on any device."""
    return tensor.dtype in KERNEL_DTYPES and type(tensor) in _PLAIN


def is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def has_arithmetic(tensor: Tensor) -> bool:
    """Whether it can be averaged: a subclass made of codes and scales, as torchao's, often cannot.

    Only asking tells, which takes memory of its size.
    """
    if not is_traceable_wrapper_subclass(tensor):
        return True
    try:
        tensor.detach().lerp(tensor.detach(), 0.5)
    except torch.OutOfMemoryError:  # also a RuntimeError
        raise
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def pieces_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that one of such a subclass is made of, any other as it is."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [piece for name in names for piece in pieces_of(getattr(tensor, name))]


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements are one place in memory."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.numel() > 0 and any(n > 1 and step == 0 for n, step in steps)


def update_eagerly(
    row: Row, decays: Sequence[float | Tensor], draws: Sequence[int | Tensor]
) -> None:
    """One row by the reference, on any device and in any layout."""
    for average, mode, lost, decay, draw in zip(
        row.averages, row.modes, row.compensations, decays, draws, strict=True
    ):
        if mode == COPY:
            averages, values = pieces_of(average.detach()), pieces_of(row.value.detach())
            reference.ema_update_(averages, values, _copying(decay))
        elif mode != KEEP:
            reference.ema_update_(
                [average.detach()],
                [row.value.detach()],
                decay,
                rounding=_ROUNDINGS[mode],
                draw=draw,
                numbers=[row.number],
                compensation=[lost],
            )


def _copying(decay: float | Tensor) -> float | Tensor:
    """Decay 0, and negative where `decay` is."""
    return decay.clamp_max(0) if isinstance(decay, Tensor) else min(decay, 0.0)
