"""The launch that averages a student into its teachers, prepared once, checked at each call."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fastmt import backends, reference
from fastmt.ema import kernel_serves
from fastmt.matching import Pair, Structure, Unmoved, check_storage, is_unmoved, matched, reshard

_AVERAGE, _COPY, _KEEP = range(3)  # as in csrc/cpu/ema.cpp
_RULES = {"copy": _COPY, "ema": _AVERAGE, "keep": _KEEP}


class Plan:
    """All pairs of one student and K teachers.

    On CPU the C++ side holds the tensors themselves, not their addresses: it reads each pointer,
    shape, stride and dtype anew at every call, so that no stale memory is ever read.
    """

    def __init__(self, teachers: Sequence[nn.Module], rules: Sequence[str], network: nn.Module):
        self.student = weakref.ref(network)
        networks = [*teachers, network]
        self._sharded = any(hasattr(m, "unshard") for n in networks for m in n.modules())
        if self._sharded:
            reshard(networks)
        self._structure = Structure(networks)
        parameters = [matched(t.named_parameters(), network.named_parameters()) for t in teachers]
        buffers = [matched(t.named_buffers(), network.named_buffers()) for t in teachers]
        for pairs in (*parameters, *buffers):
            check_storage(pairs)
        rows = _without_empty(list(zip(*parameters, strict=True)))
        unmoved = [row for row in rows if all(map(is_unmoved, row))]
        self._unmoved = Unmoved([pair for row in unmoved for pair in row])
        skipped = {id(row) for row in unmoved}
        averaged = [(row, [_AVERAGE] * len(row)) for row in rows if id(row) not in skipped]
        copied = [
            (row, [_mode(pair, rule) for pair, rule in zip(row, rules, strict=True)])
            for row in _without_empty(list(zip(*buffers, strict=True)))
        ]
        self.rows = [row for row in (*averaged, *copied) if set(row[1]) != {_KEEP}]
        self._written = [
            pair.average
            for row, modes in self.rows
            for pair, mode in zip(row, modes, strict=True)
            if mode != _KEEP
        ]
        self._key, self._rest = None, self.rows
        self._first = [p.average for row, _ in self.rows for p in row if _is_float(p.average)][:1]
        if backends.extension_missing() is None:
            self._bind()

    def _bind(self) -> None:
        served = [row for row in self.rows if all(_bindable(pair) for pair in row[0])]
        if not served:
            return
        self._rest = [row for row in self.rows if not all(_bindable(pair) for pair in row[0])]
        self._key = torch.ops.fastmt.ema_bind(
            [pair.average for row, _ in served for pair in row],
            [row[0].value for row, _ in served],
            [mode for _, modes in served for mode in modes],
        )
        weakref.finalize(self, torch.ops.fastmt.ema_release, self._key)

    def holds(self, network: nn.Module) -> bool:
        if self._sharded:
            return False  # gathering and sharding replace the tensors
        return self.student() is network and self._structure.holds() and self._unmoved.holds()

    def run(self, decays: Sequence[float | None], finite: Tensor | None) -> bool:
        """Average with a decay a teacher, None to leave it out; False where a tensor changed."""
        rest = self._rest
        backend = backends.choose("ema_update_", self._first).backend
        if finite is not None or backend == "eager":
            rest = self.rows
        if any(pair.average.shape != pair.value.shape for row, _ in rest for pair in row):
            return False
        if rest is self._rest and self._key is not None:
            given = [-1.0 if decay is None else decay for decay in decays]
            if not torch.ops.fastmt.ema_bound_update_(self._key, given):
                return False
        for row, modes in rest:
            for pair, mode, decay in zip(row, modes, decays, strict=True):
                if decay is not None and mode != _KEEP:
                    _update(pair, 0.0 if mode == _COPY else decay, finite)
        increment_version(self._written)
        return True


def _without_empty(rows: list[tuple[Pair, ...]]) -> list[tuple[Pair, ...]]:
    return [row for row in rows if row[0].average.numel()]


def _mode(pair: Pair, rule: str) -> int:
    return _COPY if rule == "ema" and not _is_float(pair.average) else _RULES[rule]


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _bindable(pair: Pair) -> bool:
    """Whether the launch serves a pair; integer and bool tensors of one dtype are copied in it."""
    average, value = pair.average, pair.value
    plain = all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in pair[1:])
    return plain and (
        kernel_serves(average, value)
        or (
            not _is_float(average)
            and average.dtype == value.dtype
            and average.is_contiguous()
            and value.is_contiguous()
        )
    )


def _update(pair: Pair, decay: float, finite: Tensor | None) -> None:
    average, value = pair.average.detach(), pair.value.detach()
    if average.is_complex():
        average, value = torch.view_as_real(average), torch.view_as_real(value)
    if finite is not None:
        value = torch.where(finite.to(value.device), value, average.to(value.device, value.dtype))
    reference.ema_update_([average], [value], decay)
