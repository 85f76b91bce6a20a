"""Averages in half precision that move, and what one launch over a table of them has to leave."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from operands import DTYPES, HALVES, random_logits
from torch import Tensor

from fastmt import reference
from fastmt.ema_bound import AVERAGE, KAHAN, STOCHASTIC
from fastmt.ema_table import CHUNK, Entry, Table

CPU = torch.device("cpu")
NAMES = {AVERAGE: "nearest", STOCHASTIC: "stochastic", KAHAN: "kahan"}
# Averages from either end, the middle, a copy in float32 alone, a copy; keeps; leaves out.
DECAYS = (0.9, 0.3, 0.5, 0.999, 1e-9, 0.0, 1.0, -1.0)
DRAWS = (0, 1, 2**31, 2**32 - 1, 12345, 7, 8, 9)
LENGTHS = (1, 3, 1500, CHUNK + 7)
# Around the ends of both dtypes and of their subnormal numbers.
_EXTREMES = (
    *(0.0, -0.0, 1.0, -3.1415927, 1 + 2.0**-12, 250.3, 1e-9, 3e-5, -(2.0**-24), 2.0**-25, 6.1e-5),
    *(2.0**-14, -(2.0**-14), 2.0**-14 - 2.0**-30, 1e-40, -1e-45, 2.0**-126, 65504.0, 65519.0),
    *(65520.0, -65535.0, 65536.0, 1e30, 3.38e38, 3.4e38, torch.inf, -torch.inf, torch.nan),
)


def extremes() -> Tensor:
    """The last one has all bits set: as a whole number it is -1."""
    bits = torch.cat([torch.tensor(_EXTREMES).view(torch.int32), torch.tensor([-1]).int()])
    return bits.view(torch.float32)


def entry(
    average: Tensor, value: Tensor, rounding: int, teacher: int = 0, number: int = 0
) -> Entry:
    lost = None
    if rounding == KAHAN:  # as far from a multiple of 16 bytes as the average, or not
        skip = average.storage_offset() + number % 2
        around = torch.empty(average.numel() + skip, dtype=average.dtype)
        lost = around.as_strided(average.shape, average.stride(), skip).zero_()
    return Entry(average, value, teacher, rounding=rounding, number=number, lost=lost)


def entries(lengths: Sequence[int] = LENGTHS) -> list[Entry]:
    """Every dtype, length, alignment, rounding and teacher, though not every one with every one."""
    found, kinds = [], itertools.product(HALVES, DTYPES, (STOCHASTIC, KAHAN), lengths)
    for i, (half, dtype, rounding, length) in enumerate(kinds):
        skip, other = i // 3 % 5 * (i % 3 > 0), i // 5 % 7 * (i % 3 == 1)
        average = random_logits((length + skip,), 2 * i, dtype=half)[skip:]
        value = random_logits((length + other,), 2 * i + 1, dtype=dtype)[other:]
        found.append(entry(average, value, rounding, 3 * (i + i // 8) % len(DECAYS), number=i))
    return found


def launched(
    kernels: Any, listed: Sequence[Entry], decays: Sequence[float], draws: Sequence[int]
) -> None:
    """One update of all entries."""
    assert all(each.is_served(CPU) for each in listed)
    table = Table(listed, CPU)
    table.update(kernels, torch.tensor(decays, dtype=torch.float64), torch.tensor(draws))


def expected(
    listed: Sequence[Entry], decays: Sequence[float], draws: Sequence[int]
) -> list[tuple[Tensor, ...]]:
    """What the reference makes of copies of the averages, and of what rounding has lost."""
    results = []
    for each in listed:
        average, lost = (None if t is None else t.clone() for t in (each.average, each.lost))
        reference.ema_update_(
            [average],
            [each.value],
            decays[each.teacher],
            rounding=NAMES[each.rounding],
            draw=draws[each.teacher],
            numbers=[each.number],
            compensation=[lost],
        )
        results.append((average, lost))
    return results


def assert_equal_to_the_bit(listed: Sequence[Entry], results: Sequence[tuple[Tensor, ...]]) -> None:
    for number, (each, (average, lost)) in enumerate(zip(listed, results, strict=True)):
        what = f"entry {number}: {each.average.dtype}, {each.value.dtype}, {each.average.shape}"
        assert _same(each.average, average), what
        assert lost is None or _same(each.lost, lost), f"lost of {what}"


def assert_update_is_the_reference(
    kernels: Any, listed: Sequence[Entry], decays: Sequence[float], draws: Sequence[int]
) -> None:
    results = expected(listed, decays, draws)
    before = [each.value.clone() for each in listed]
    launched(kernels, listed, decays, draws)
    assert_equal_to_the_bit(listed, results)
    assert all(_same(each.value, value) for each, value in zip(listed, before, strict=True))


def _same(one: Tensor, other: Tensor) -> bool:
    """Of a NaN only that it is one: each processor has its own."""
    words = torch.int32 if one.dtype == torch.float32 else torch.int16
    numbers = ~one.isnan()
    bits = (t.contiguous().view(words)[numbers] for t in (one, other))
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(*bits)
