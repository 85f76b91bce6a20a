"""A table of addresses with every kind of entry, and what one launch over it has to leave."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from operands import DTYPES, random_logits
from tolerances import assert_average_close
from torch import Tensor

from fastmt.ema_table import CHUNK, Entry, Table

DECAYS = (0.9, 0.0, 1.0, -1.0)  # averages, copies, keeps; leaves out
LENGTHS = (3, 5000, CHUNK, CHUNK + 7)
COPIED = (torch.int64, torch.bool, torch.complex64)


def assert_entries_are_updated(kernels: Any) -> None:
    """ema_update_ on the CPU: several teachers, averages and copies, all in one launch."""
    entries = list(_entries())
    before = [(entry.average.clone(), entry.value.clone()) for entry in entries]
    cpu = torch.device("cpu")
    assert all(entry.is_served(cpu) for entry in entries)
    Table(entries, cpu).update(kernels, torch.tensor(DECAYS, dtype=torch.float64))
    for entry, (average, value) in zip(entries, before, strict=True):
        assert torch.equal(entry.value, value)
        _assert_updated(entry, average)


def _entries() -> Iterator[Entry]:
    for teacher, length, skip in itertools.product(range(len(DECAYS)), LENGTHS, (0, 1)):
        average, value = (random_logits([length + skip], seed)[skip:] for seed in (1, 2))
        half = value.to(DTYPES[teacher % 2 + 1])
        yield Entry(average, value, teacher)
        yield Entry(torch.full_like(average, torch.nan), half, teacher, copies=True)
        for dtype in COPIED:
            pair = ((10 * tensor).to(dtype) for tensor in (average, value))
            yield Entry(*pair, teacher, copies=True)


def _assert_updated(entry: Entry, before: Tensor) -> None:
    decay, value = DECAYS[entry.teacher], entry.value
    if decay < 0 or (decay == 1 and not entry.copies):
        assert torch.equal(entry.average.nan_to_num(7), before.nan_to_num(7))
    elif entry.copies or decay == 0:
        assert torch.equal(entry.average, value.to(before.dtype))
    else:
        mean = decay * before.double() + (1 - decay) * value.double()
        assert_average_close(entry.average, mean)
