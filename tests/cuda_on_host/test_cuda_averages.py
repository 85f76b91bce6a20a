"""Moving averages and scaling by csrc/cuda: all dtypes, lengths and alignments in one launch."""

from __future__ import annotations

import itertools

import pytest
import torch
from entries import assert_entries_are_updated
from operands import DTYPES, random_logits
from tolerances import assert_average_close

from fastmt.ema_table import CHUNK, Entry, Table


def update(operations, teachers, students, decay):
    """One launch over all pairs."""
    table = Table(list(map(Entry, teachers, students)), torch.device("cpu"))
    table.update(operations, torch.tensor(decay, dtype=torch.float64))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0])
def test_one_launch_averages_tensors_of_all_dtypes_lengths_and_alignments(operations, decay):
    lengths = [1, 3, 8, 4095, 4096, 4097, CHUNK - 1, CHUNK, 2 * CHUNK + 5]
    pairs = list(itertools.product(DTYPES, DTYPES))
    cases = [
        (length, *pairs[i % 9], i % 4, i // 4 % 5)
        for i, length in enumerate(length for length in lengths for _ in range(9))
    ]
    teachers, students = (
        [
            random_logits((case[0] + case[3 + which],), seed, dtype=case[1 + which])[
                case[3 + which] :
            ]
            for seed, case in enumerate(cases, start=1000 * which)
        ]
        for which in (0, 1)
    )
    expected = [
        decay * t.double() + (1 - decay) * s.double()
        for t, s in zip(teachers, students, strict=True)
    ]
    update(operations, teachers, students, decay)
    for average, mean in zip(teachers, expected, strict=True):
        assert_average_close(average, mean)


def test_one_launch_averages_and_copies_for_several_teachers(operations):
    assert_entries_are_updated(operations)


def test_decay_0_copies_over_a_nan(operations):
    teacher, student = torch.full((5000,), torch.nan), random_logits((5000,), 0)
    update(operations, [teacher], [student], 0.0)
    assert torch.equal(teacher, student)


def test_decay_1_keeps_whatever_the_student_holds(operations):
    teacher, student = random_logits((5000,), 0), torch.full((5000,), torch.nan)
    before = teacher.clone()
    update(operations, [teacher], [student], 1.0)
    assert torch.equal(teacher, before)


@pytest.mark.parametrize(
    ("decay", "teacher", "student"), [(0.9999, 0, 1), (0.9999, 1, 1e6), (1e-4, 1e6, 1)]
)
def test_an_average_is_taken_from_the_nearer_end(operations, decay, teacher, student):
    average, value = torch.full((9,), float(teacher)), torch.full((9,), float(student))
    update(operations, [average], [value], decay)
    expected = torch.full((9,), decay * teacher + (1 - decay) * student)
    torch.testing.assert_close(average, expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [9001, 200_000])  # fewer pieces than blocks, and more
def test_scaling_multiplies_by_both_factors_and_0_clears_a_nan(operations, dtype, length):
    data = random_logits((length,), 0, dtype=dtype)
    expected = (data.float() * 0.75).to(dtype)
    operations.scale_(data, torch.tensor(1.5), torch.tensor(0.5))
    assert torch.equal(data, expected)
    data[7] = torch.nan
    operations.scale_(data, torch.tensor(0.0), torch.tensor(0.5))
    assert not data.any()
