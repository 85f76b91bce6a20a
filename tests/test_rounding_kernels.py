"""Averages in half precision that a table of addresses leads to are the reference's, to the bit.

These are the C++ kernels of the CPU; tests/cuda_on_host and tests/triton_kernels run the
same tests on those of a GPU.
"""

from __future__ import annotations

import itertools
import platform

import pytest
import torch
from entries import DECAYS as DECAYS_BESIDE
from entries import assert_entries_are_updated
from hypothesis import given
from hypothesis import strategies as st
from operands import DTYPES, HALVES, random_logits
from rounded import (
    CPU,
    DECAYS,
    DRAWS,
    assert_equal_to_the_bit,
    assert_update_is_the_reference,
    entries,
    entry,
    expected,
    extremes,
    launched,
)

from fastmt import cpp_backend
from fastmt.ema_bound import KAHAN, STOCHASTIC
from fastmt.ema_table import CHUNK, Entry, Table
from fastmt.rounding import mixed, stochastically_rounded

ROUNDINGS = (STOCHASTIC, KAHAN)


@pytest.fixture(scope="module")
def operations():
    if reason := cpp_backend.missing():
        pytest.skip(reason)
    if platform.machine() == "x86_64" and torch.ops.fastmt.instruction_set() == "baseline":
        pytest.skip("rounds a product before it adds to it")
    return torch.ops.fastmt


@pytest.fixture(autouse=True)
def implementation(one_thread):
    pass


def test_one_launch_rounds_all_dtypes_lengths_and_alignments_of_several_teachers(operations):
    assert_update_is_the_reference(operations, entries(), DECAYS, DRAWS)


def test_averages_that_round_leave_others_and_copies_of_the_same_launch_as_they_are(operations):
    listed = [each for each in entries([5000]) if each.teacher < 4]

    class Beside:
        """The operations, with entries that round in the tables of others."""

        def ema_update_(self, table, starts, decays):
            rounded = Table(listed, CPU)
            rows = torch.cat([table, rounded.rows])
            both = torch.cat([starts, starts[-1] + rounded.starts[1:]])
            operations.ema_update_(rows, both, decays, torch.tensor(DRAWS[:4]))

    results = expected(listed, DECAYS_BESIDE, DRAWS)
    assert_entries_are_updated(Beside())
    assert_equal_to_the_bit(listed, results)


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 0.9])
def test_values_of_any_size_are_rounded_as_the_reference_rounds_them(operations, decay):
    every = extremes()
    olds, values = every.repeat_interleave(len(every)), every.repeat(len(every))
    listed = [
        entry(olds.to(half), values.to(dtype), rounding, number=number)
        for number, (half, dtype, rounding) in enumerate(
            itertools.product(HALVES, DTYPES, ROUNDINGS)
        )
    ]
    for each in listed:
        if each.lost is not None:
            each.lost.copy_(random_logits(olds.shape, 0) * 1e-3 * olds.nan_to_num(0, 0, 0))
    assert_update_is_the_reference(operations, listed, [decay], [11])


def test_200_updates_in_a_row_stay_the_reference_to_the_bit(operations):
    kinds = ((HALVES[0], torch.float32, KAHAN), (HALVES[1], torch.bfloat16, STOCHASTIC))
    listed = [
        entry(random_logits((37,), i, dtype=half), random_logits((37,), 9 + i).to(dtype), rounding)
        for i, (half, dtype, rounding) in enumerate(kinds)
    ]
    copies = [
        each._replace(
            average=each.average.clone(), lost=None if each.lost is None else each.lost.clone()
        )
        for each in listed
    ]
    for step in range(200):
        decays, draws = [min(step / (step + 1), 0.99)], [mixed(step)]
        for each in listed:
            each.value.add_(random_logits((37,), step, 0.1))
        for each, (average, lost) in zip(copies, expected(copies, decays, draws), strict=True):
            each.average.copy_(average)
            if lost is not None:
                each.lost.copy_(lost)
        launched(operations, listed, decays, draws)
    assert_equal_to_the_bit(listed, [(each.average, each.lost) for each in copies])


@pytest.mark.parametrize("decay", [1.0, -1.0])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_is_to_change_nothing_leaves_no_trace_of_a_student_that_is_not_finite(
    operations, decay, rounding
):
    listed = [
        entry(random_logits((5000,), 1, dtype=half), torch.full((5000,), torch.nan), rounding)
        for half in HALVES
    ]
    for each in listed:
        if each.lost is not None:
            each.lost.fill_(0.375)
    kept = [(e.average.clone(), None if e.lost is None else e.lost.clone()) for e in listed]
    launched(operations, listed, [decay], [3])
    assert_equal_to_the_bit(listed, kept)


@pytest.mark.skipif(torch.cuda.is_available(), reason="moves all memory of a table to the GPU")
@pytest.mark.parametrize("half", HALVES)
def test_elements_beyond_2_to_the_32_have_random_numbers_of_their_own(operations, half):
    beyond, length = 2**32, 100
    average, value = torch.zeros(length, dtype=half), random_logits((length,), 1)
    table = Table([Entry(average, value, rounding=STOCHASTIC, number=5)], CPU)
    # A tensor of which only the last chunk has memory, and is the first one there is.
    table.rows[0, 0] -= beyond * average.itemsize
    table.rows[0, 1] -= beyond * value.itemsize
    table.rows[0, 2] += beyond
    table.starts[0] = -(beyond // CHUNK)
    table.update(operations, torch.zeros((), dtype=torch.float64), torch.tensor(9))
    bits = mixed(mixed(torch.arange(length)) ^ mixed(9 ^ mixed(5)) ^ 1)
    assert torch.equal(average, stochastically_rounded(value, half, bits).to(half))


UINT32 = st.integers(0, 2**32 - 1)


@given(
    shapes=st.lists(st.lists(st.integers(1, 12), max_size=3), min_size=1, max_size=4),
    half=st.sampled_from(HALVES),
    dtype=st.sampled_from(DTYPES),
    rounding=st.sampled_from(ROUNDINGS),
    decay=st.one_of(st.floats(0, 1), st.floats(0.9, 1), st.just(0.5)),
    draw=UINT32,
    number=UINT32,
    scale=st.sampled_from([1e-6, 1.0, 1e4, 1e30]),
)
def test_tensors_of_any_shape_and_draw_are_the_reference(
    operations, shapes, half, dtype, rounding, decay, draw, number, scale
):
    listed = [
        entry(
            random_logits(shape, i, scale, half),
            random_logits(shape, i + 9, scale, dtype),
            rounding,
            number=(number + i) % 2**32,
        )
        for i, shape in enumerate(shapes)
    ]
    assert_update_is_the_reference(operations, listed, [decay], [draw])
