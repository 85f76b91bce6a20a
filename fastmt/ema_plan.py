"""The launch that averages a student into its teachers: matched once, checked at each call."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import filterfalse
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fastmt import backends, cpp_backend
from fastmt.ema_bound import (
    AVERAGE,
    COPY,
    KAHAN,
    KEEP,
    STOCHASTIC,
    Bound,
    Rest,
    Row,
    has_arithmetic,
    has_kernels,
    is_served,
    pieces_of,
    place_of,
    update_eagerly,
)
from fastmt.ema_staging import Staging
from fastmt.ema_table import DeviceUpdate, are_on_host, decay_on, is_read_by
from fastmt.matching import Pair, Shards, Structure, check_memory, matched
from fastmt.reference import is_averaged

_RULES = {"copy": COPY, "ema": AVERAGE, "keep": KEEP}
_ROUNDINGS = {None: AVERAGE, "stochastic": STOCHASTIC, "kahan": KAHAN}


class Track(NamedTuple):
    """One teacher, and how its network follows."""

    teacher: nn.Module  # its network is `module`, which may be exchanged as well
    buffers: str  # "copy", "ema" or "keep"
    rounding: str | None  # of half-precision parameters: None, "stochastic" or "kahan"
    compensation: dict[str, Tensor]  # by parameter, what "kahan" has lost; filled as needed


class Plan:
    """All rows of one student and K teachers, the launch they are bound to, and when it holds."""

    def __init__(self, tracks: Sequence[Track], network: nn.Module) -> None:
        _check_not_held(tracks, network)
        self.student = weakref.ref(network)
        networks = [*(track.teacher for track in tracks), network]
        shards, structure = Shards(networks), Structure(networks)
        parameters = _rows(tracks, network, nn.Module.named_parameters)
        buffers = _buffer_rows(tracks, network)
        left_out = [_left_out(pairs) for pairs in (*parameters, *buffers) if _is_empty(pairs)]
        parameters, buffers = (list(filterfalse(_is_empty, p)) for p in (parameters, buffers))
        self.rows = [
            *(_averaged(number, pairs, tracks) for number, pairs in enumerate(parameters)),
            *(_followed(number, pairs, tracks) for number, pairs in enumerate(buffers)),
        ]
        self.rows, tied = _each_once(self.rows)
        left_out = Rest(left_out + tied)
        # The shards first: to look at them puts them back into the structure.
        self._guards = [shards] * shards.any + [structure] + [left_out] * bool(left_out.rows)
        self.staging = self._staged() if any(map(_is_offloaded, self.rows)) else None
        self._written = [
            average
            for row in self.rows
            for average, mode in zip(row.averages, row.modes, strict=True)
            if mode != KEEP
        ]
        averages = [average for row in self.rows for average in row.averages]
        self.device = averages[0].device if averages else torch.device("cpu")
        floating = [average for average in averages if average.is_floating_point()]
        self._first = (list(filter(has_kernels, floating)) or floating)[:1]
        self.on_host = are_on_host(self._first)
        self._choice = backends.Remembered("ema_update_", self._first)
        bound, rest = _parted(self.rows)
        self._rest, self._all = Rest(rest), Rest(self.rows)
        self._bound = Bound(bound) if bound else None
        self._on_device: DeviceUpdate | None = None  # made when first needed

    def holds(self, network: nn.Module) -> bool:
        return self.student() is network and all(guard.holds() for guard in self._guards)

    def _staged(self) -> Staging:
        """Let the rows read host copies of the student."""
        staging = Staging([row.value for row in self.rows])
        pairs = zip(self.rows, staging.copies, strict=True)
        self.rows = [row._replace(value=copy) for row, copy in pairs]
        return staging

    def run(self, decays: Sequence[float | Tensor], draws: Sequence[int | Tensor]) -> bool:
        """Average with a decay a teacher, negative to leave it out.

        False, with nothing done, where a tensor has another layout than it was matched with.
        Teachers on the CPU of a student elsewhere are averaged at the next run, or by flush().
        """
        if self.staging is None:
            return self._average(decays, draws)
        self.flush()
        fits = self.staging.fits()
        if fits:
            self.staging.fill(decays, draws)
        return fits

    def flush(self) -> None:
        """Make the averages whose values are on their way to the host."""
        if self.staging is not None and self.staging.is_full:
            decays, draws = self.staging.empty()
            if not self._average(decays, draws):  # an average was given another layout meanwhile
                for row in self.rows:
                    update_eagerly(row, decays, draws)

    def _average(self, decays: Sequence[float | Tensor], draws: Sequence[int | Tensor]) -> bool:
        backend = self._choice.backend()
        if is_read_by(backend, self.on_host):
            return self._run_on_device(backends.operations(backend), decays, draws)
        bound, rest = self._bound, self._rest
        if backend == "eager" or [decay for decay in decays if isinstance(decay, Tensor)]:
            bound, rest = None, self._all
        if not rest.holds() or (bound is not None and not bound.holds()):
            return False
        increment_version(self._written)
        if bound is not None:
            bound.run(decays, draws)
        for row in rest.rows:
            update_eagerly(row, decays, draws)
        return True

    def _run_on_device(
        self, kernels: Any, decays: Sequence[float | Tensor], draws: Sequence[int | Tensor]
    ) -> bool:
        if self._on_device is None:
            self._on_device = DeviceUpdate(self.rows, self.device)
        if not self._on_device.holds():
            return False
        increment_version(self._written)
        self._on_device.run(kernels, [decay_on(self.device, decay) for decay in decays], draws)
        for teacher, row in self._on_device.rest:
            update_eagerly(row, [decays[teacher]], [draws[teacher]])
        return True


def _check_not_held(tracks: Sequence[Track], network: nn.Module) -> None:
    held = set(network.modules())
    if any(track.teacher in held for track in tracks):
        raise ValueError(
            "student: it holds its own teacher, as `self.teacher = EMATeacher(self)` does; make "
            "the teacher of the part that is trained"
        )


def _is_offloaded(row: Row) -> bool:
    away = [average.device.type == "cpu" != row.value.device.type for average in row.averages]
    if len(set(away)) > 1:  # an average of the one kind is made later, of the other at once
        raise ValueError(
            "teachers: got some on the CPU and some on the GPU of their student; update each kind "
            "on its own"
        )
    return away[0]


def _rows(tracks: Sequence[Track], network: nn.Module, named) -> list[tuple[Pair, ...]]:
    """The pairs of each entry of `network`, one a teacher."""
    followed = [matched(named(track.teacher.module), named(network)) for track in tracks]
    for pairs in followed:
        check_memory(pairs)
    return list(zip(*followed, strict=True))


def _parted(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """What C++ holds and launches of the rows, and what is left of them; a row may be in both."""
    usable = cpp_backend.missing() is None
    bound, rest = [], []
    for row in rows:
        fits = [usable and is_served(alone) for alone in row.of_each()]
        if any(fits):
            bound.append(_of(row, fits))
        if not all(fits):
            rest.append(_of(row, [not fit for fit in fits]))
    return bound, rest


def _of(row: Row, teachers: Sequence[bool]) -> Row:
    """The row of these teachers; in the place of another's average the value is left alone."""
    columns = zip(row.averages, row.modes, row.compensations, teachers, strict=True)
    those = [column[:3] if column[3] else (row.value, KEEP, None) for column in columns]
    averages, modes, lost = zip(*those, strict=True)
    return row._replace(averages=averages, modes=modes, compensations=lost)


def _is_empty(pairs: tuple[Pair, ...]) -> bool:
    return pairs[0].average.numel() == 0


def _left_out(pairs: tuple[Pair, ...]) -> Row:
    """Of empty tensors, to which nothing is done."""
    averages, nothing = tuple(pair.average for pair in pairs), (None,) * len(pairs)
    return Row(0, averages, pairs[0].value, (KEEP,) * len(pairs), nothing)


def _buffer_rows(tracks: Sequence[Track], network: nn.Module) -> list[tuple[Pair, ...]]:
    """Kept ones need not match, as a student may make caches of its own.

    Another teacher's stands in the place of a kept one, where it is left alone.
    """
    following = [track for track in tracks if track.buffers != "keep"]
    places = [following.index(track) if track in following else 0 for track in tracks]
    rows = _rows(following, network, _named_buffers)
    return [tuple(pairs[place] for place in places) for pairs in rows]


def _named_buffers(network: nn.Module) -> list[tuple[str, Tensor]]:
    """Without those that are parameters as well, which the average of these already moves."""
    parameters = set(network.parameters())
    return [(name, buffer) for name, buffer in network.named_buffers() if buffer not in parameters]


def _each_once(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows, of averages in one place in memory the first alone moving; and those of the others.

    A state dict that is assigned ties what was tied by storage in the network that it is of.
    """
    seen, once, tied = set(), [], []
    for row in rows:
        modes, lost = list(row.modes), list(row.compensations)
        for teacher, average in enumerate(row.averages):
            place = teacher, place_of(average), average.numel()
            if modes[teacher] != KEEP and place in seen:
                modes[teacher], lost[teacher] = KEEP, None
            elif modes[teacher] != KEEP:
                seen.add(place)
        once.append(row._replace(modes=tuple(modes), compensations=tuple(lost)))
        if once[-1].modes != row.modes:
            tied.append(row)
    return once, tied


def _averaged(number: int, pairs: tuple[Pair, ...], tracks: Sequence[Track]) -> Row:
    modes = [
        _parameter_mode(pair, track.rounding) for pair, track in zip(pairs, tracks, strict=True)
    ]
    lost = [
        _compensation(track, pair) if mode == KAHAN else None
        for pair, track, mode in zip(pairs, tracks, modes, strict=True)
    ]
    averages = tuple(pair.average for pair in pairs)
    return Row(number, averages, pairs[0].value, tuple(modes), tuple(lost))


def _compensation(track: Track, pair: Pair) -> Tensor:
    kept = track.compensation.get(pair.name)
    if kept is None or kept.shape != pair.average.shape or kept.dtype != pair.average.dtype:
        kept = torch.zeros_like(pair.average)
    # In the memory order of the average, which a checkpoint need not have kept.
    track.compensation[pair.name] = torch.empty_like(pair.average).copy_(kept)
    return track.compensation[pair.name]


def _followed(number: int, pairs: tuple[Pair, ...], tracks: Sequence[Track]) -> Row:
    """A buffer; one that has no average, as integers, is copied unless kept."""
    averages = tuple(pair.average for pair in pairs)
    rules = [_RULES[track.buffers] for track in tracks]
    fit = [is_averaged(average) and has_arithmetic(average) for average in averages]
    modes = [
        rule if rule != AVERAGE or fits else COPY for rule, fits in zip(rules, fit, strict=True)
    ]
    return Row(number, averages, pairs[0].value, tuple(modes), (None,) * len(pairs))


def _parameter_mode(pair: Pair, rounding: str | None) -> int:
    if not (has_arithmetic(pair.average) and has_arithmetic(pair.value)):
        _check_copied(pair)
        return COPY
    if pair.average.dtype in (torch.bfloat16, torch.float16):
        return _ROUNDINGS[rounding]
    return AVERAGE if is_averaged(pair.average) else COPY


def _check_copied(pair: Pair) -> None:
    """A copy is the average of a tensor that is not trained alone."""
    name, average, value = pair
    kinds = [type(tensor).__name__ for tensor in (average, value)]
    shapes = [[piece.shape for piece in pieces_of(tensor)] for tensor in (average, value)]
    if kinds[0] != kinds[1] or shapes[0] != shapes[1]:
        raise TypeError(
            f"student: {name!r} is {kinds[1]}, in the teacher {kinds[0]}, of which one cannot be "
            "averaged and needs the other alike; make a new EMATeacher"
        )
    if value.requires_grad:
        raise TypeError(
            f"student: {name!r} is {kinds[1]}, which cannot be averaged (it has no lerp()) and is "
            "copied where it requires no grad alone"
        )
