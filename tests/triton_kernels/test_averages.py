"""The moving average and the scaling of gradients, one launch each."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from entries import assert_entries_are_updated
from operands import DTYPES, random_logits
from test_ema import *  # noqa: F403
from test_ema_memory import *  # noqa: F403
from test_ema_refused import *  # noqa: F403
from test_rounding_kernels import *  # noqa: F403
from test_teacher_rounding_on_device import *  # noqa: F403
from tolerances import assert_average_close
from torch import nn

import fastmt
from fastmt import ema_lists, ema_table, kernels
from fastmt.kernels import ema
from fastmt.kernels import launch as launching


@pytest.fixture(autouse=True)
def implementation(one_thread):
    """The Triton launch, with the reference for what it does not serve."""
    with fastmt.backend("triton"):
        yield


@pytest.fixture
def operations():
    return kernels


def test_every_pair_of_dtypes_length_and_alignment_lies_in_one_launch(monkeypatch):
    launches = []
    launch = kernels.ema_update_
    monkeypatch.setattr(kernels, "ema_update_", lambda *a: (launches.append(a), launch(*a)))
    lengths = (1, 7, 16 * 1024, 40_000)
    pairs = [
        (random_logits([n + skip], i, dtype=t)[skip:], random_logits([n], i + 1, dtype=s))
        for i, (t, s, n, skip) in enumerate(itertools.product(DTYPES, DTYPES, lengths, (0, 1)))
    ]
    teacher, student = map(list, zip(*pairs, strict=True))
    expected = [0.9 * t.double() + 0.1 * s.double() for t, s in pairs]
    fastmt.ema_update_(teacher, student, torch.tensor(0.9))
    for average, mean in zip(teacher, expected, strict=True):
        assert_average_close(average, mean)
    assert len(launches) == 1
    table, starts, decay = launches[0]
    assert table.shape == (len(pairs), ema.COLUMNS)
    assert starts[-1] == sum(-(-len(t) // (16 * 1024)) for t in teacher)
    assert decay.ndim == 0


def test_one_launch_averages_and_copies_for_several_teachers():
    assert_entries_are_updated(kernels)


def test_chunks_find_their_rows_among_more_than_one_lookup_holds_and_empty_ones():
    lengths = [0] * 2100
    lengths[3], lengths[1024], lengths[2099] = 5, 16 * 1024 + 1, 2
    entries = [ema_table.Entry(torch.zeros(n), torch.ones(n)) for n in lengths]
    table = ema_table.Table(entries, torch.device("cpu"))
    table.update(kernels, torch.tensor(0.75, dtype=torch.float64))
    assert all((entry.average == 0.25).all() for entry in entries)


def test_a_table_that_a_graph_reads_outlives_the_tables_of_other_lists(monkeypatch):
    held = []  # or lists of one address, one after the other, would share a place

    def update(elements):
        held.append((torch.zeros(elements), torch.ones(elements)))
        fastmt.ema_update_(*([tensor] for tensor in held[-1]), 0.9)
        return weakref.ref(next(reversed(ema_lists._tables.values())).table.rows)

    forgotten = update(3)
    with monkeypatch.context() as patch:
        patch.setattr(ema_lists, "is_capturing", lambda: True)
        captured = update(4)
    for elements in range(5, 6 + ema_lists._MAX_TABLES):
        update(elements)
    assert forgotten() is None
    assert captured() is not None


def test_a_view_that_negates_its_memory_is_averaged_with_its_sign():
    teacher = [torch.zeros(4), torch._neg_view(torch.zeros(4))]
    student = [torch._neg_view(torch.ones(4)), torch.ones(4)]
    fastmt.ema_update_(teacher, student, 0.5)
    assert [average.tolist() for average in teacher] == [[-0.5] * 4, [0.5] * 4]


@pytest.mark.parametrize("decay", [torch.tensor(1.0), None])
def test_a_student_that_is_not_finite_leaves_no_trace_where_nothing_is_to_change(decay):
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        teacher = fastmt.EMATeacher(network, 0.9)
        teacher.update()
        before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
        network[0].weight[0, 0], network[1].running_mean[0] = torch.nan, torch.inf
    if decay is None:
        teacher.update(finite=torch.tensor(False), decay=torch.tensor(0.9, dtype=torch.float64))
    else:
        averages, values = [teacher.module[0].weight.data], [network[0].weight.data]
        fastmt.ema_update_(averages, values, decay)
    for name, value in teacher.module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [1, 2048, 5000])
def test_a_gradient_is_scaled_by_both_factors(dtype, elements):
    data = random_logits([elements], 0, dtype=dtype)
    expected = (data.float() * 0.5 * 3).to(dtype)
    kernels.scale_(data, torch.tensor(0.5), torch.tensor(3.0))
    assert torch.equal(data, expected)


def test_scaling_starts_no_more_programs_than_fill_the_device(monkeypatch):
    started = []

    def prepare(kernel, programs, *_, **options):
        started.append(programs)
        return lambda *given: None

    monkeypatch.setattr(launching, "_prepared", {})
    monkeypatch.setattr(ema, "Launch", prepare)
    monkeypatch.setattr(ema, "programs_on", lambda device: 3)
    kernels.scale_(torch.zeros(10 * ema.BLOCK), torch.tensor(1.0), torch.tensor(1.0))
    assert started == [3]


def test_a_scale_of_1_leaves_the_gradient_and_one_of_0_clears_it_even_of_nan():
    data = torch.tensor([1.0, torch.nan, torch.inf])
    before = data.clone()
    kernels.scale_(data, torch.tensor(0.5), torch.tensor(2.0))
    assert torch.equal(data.nan_to_num(7), before.nan_to_num(7))
    kernels.scale_(data, torch.tensor(0.0), torch.tensor(2.0))
    assert not data.any()
