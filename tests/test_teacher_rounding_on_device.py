"""Teachers in half precision as a GPU updates them, a table and one launch, against the reference.

By the CPU's kernels, or Triton's where tests/triton_kernels runs this.
"""

from __future__ import annotations

import copy

import pytest
import torch
from followed import assert_same
from test_ema_table import Net, as_on_a_gpu, moved  # noqa: F401, with a fixture
from test_rounding_kernels import operations  # noqa: F401, a fixture
from torch import nn

import fastmt
from fastmt import ema_plan, teacher_update

ROUNDINGS = ("stochastic", "kahan")
HALVES = (torch.bfloat16, torch.float16)


class Channels(Net):
    """Weights in the memory order of channels-last images as well."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)


class Launches:
    """The kernels of a table, and what they were launched with."""

    def __init__(self, kernels):
        self.operations, self.calls = kernels, []

    def ema_update_(self, *arguments):
        self.calls.append(arguments)
        self.operations.ema_update_(*arguments)


@pytest.fixture
def launches(operations, as_on_a_gpu, monkeypatch, one_thread):  # noqa: F811
    """Every update from here on is a launch of these."""
    kernels = Launches(operations)
    as_on_a_gpu()
    monkeypatch.setattr(ema_plan.backends, "operations", lambda backend: kernels)
    return kernels


def teachers(*options):
    torch.manual_seed(0)
    student = Channels()
    shared = {"decay": 0.9, "warmup": "tenths"}
    return student, [fastmt.EMATeacher(student, **shared, **own) for own in options]


def by_reference(*options, steps=4):
    """Their states after each update."""
    student, made = teachers(*options)
    states = []
    with pytest.MonkeyPatch.context() as patch, fastmt.backend("eager"):
        patch.setattr(ema_plan, "is_read_by", lambda *_: False)
        for seed in range(steps):
            moved(student, seed)
            fastmt.update_together(made)
            states.append([copy.deepcopy(teacher) for teacher in made])
    return states


def assert_rounded_alike(teacher, expected):
    """What is in half precision to the bit, the rest as other kernels round it."""
    for name, average in teacher.module.state_dict().items():
        other = expected.module.state_dict()[name]
        exact = average.dtype in HALVES
        rounded = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(average, other, **rounded, msg=name)
    for name, lost in teacher.compensation.items():
        assert torch.equal(lost, expected.compensation[name]), name


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("given", ["number", "tensor"])
def test_a_teacher_takes_one_launch_and_is_the_reference_to_the_bit(
    launches, rounding, dtype, given
):
    options = {"dtype": dtype, "rounding": rounding, "seed": 5}
    states = by_reference(options)
    student, [teacher] = teachers(options)
    for seed, [expected] in enumerate(states):
        moved(student, seed)
        decay = teacher.put_decay()[0] if given == "tensor" else None
        teacher.update(decay=decay)
        assert_rounded_alike(teacher, expected)
    assert len(launches.calls) == len(states)
    left = [row.averages[0].dtype for _, row in teacher._plan._on_device.rest]
    assert set(left) <= {torch.float64, torch.complex64}


def test_teachers_of_several_kinds_share_a_launch_with_draws_and_decays_of_their_own(launches):
    bfloat16, float16 = HALVES
    options = (
        {"dtype": bfloat16, "rounding": "stochastic", "seed": 1},
        {"dtype": bfloat16, "rounding": "stochastic", "seed": 2, "update_every": 2},
        {"dtype": float16, "rounding": "kahan", "start": 2},
        {},
    )
    states = by_reference(*options)
    student, made = teachers(*options)
    for seed, expected in enumerate(states):
        moved(student, seed)
        fastmt.update_together(made)
        for teacher, other in zip(made, expected, strict=True):
            assert_rounded_alike(teacher, other)
    assert len(launches.calls) == len(states)
    weights = [teacher.module.body[0].weight for teacher in made[:2]]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_step_that_was_skipped_changes_nothing(launches, rounding):
    student, [teacher] = teachers({"dtype": torch.bfloat16, "rounding": rounding})
    moved(student, 0)
    teacher.update()
    before = copy.deepcopy(teacher)
    with torch.no_grad():
        student.scalar.fill_(torch.nan)
    teacher.update(finite=torch.tensor(False), decay=torch.tensor(0.5, dtype=torch.float64))
    assert_same(teacher.module, before.module)
    assert_rounded_alike(teacher, before)
    assert len(launches.calls) == 2


def test_a_captured_update_reads_decay_and_draw_of_each_replay_from_the_device(
    launches, monkeypatch
):
    options = {"dtype": torch.bfloat16, "rounding": "stochastic"}
    states = by_reference(options)
    student, [teacher] = teachers(options)
    moved(student, 0)
    teacher.update()
    teacher.put_decay()
    with monkeypatch.context() as patch:
        patch.setattr(teacher_update, "is_capturing", lambda: True)
        before = copy.deepcopy(teacher.module.state_dict())
        teacher.update()
        teacher.module.load_state_dict(before)
    table, starts, decays, draws = launches.calls[-1]
    for seed, [expected] in enumerate(states[1:], start=1):
        moved(student, seed)
        teacher.advance()
        launches.operations.ema_update_(table, starts, decays, draws)
        ours, others = (t.module.body[0].weight for t in (teacher, expected))
        assert torch.equal(ours, others)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_teacher_that_does_not_round_has_no_draws_to_be_made(launches, rounding):
    _student, [plain, rounded] = teachers({}, {"dtype": torch.bfloat16, "rounding": rounding})
    plain.update()
    rounded.update()
    assert [len(call) for call in launches.calls] == [3, 4]


def test_compensation_that_was_loaded_is_found(launches):
    options = {"dtype": torch.bfloat16, "rounding": "kahan"}
    student, [teacher, other] = teachers(options, options)
    for seed in range(4):
        moved(student, seed)
        for each in (teacher, other):
            each.update()
        if seed == 1:
            state, progress = copy.deepcopy((other.state_dict(), other.progress()))
            other.load_state_dict(state)
            other.load_progress(progress)
    assert_rounded_alike(teacher, other)
    assert any(lost.any() for lost in teacher.compensation.values())
