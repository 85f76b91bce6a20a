"""Tensors that C++ holds from one update to the next: how they are let go, and when refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from followed import Net, advance, assert_same
from torch import nn

import fastmt
from fastmt import EMATeacher, cpp_backend
from fastmt.ema_bound import AVERAGE, KEEP, Bound, Row
from fastmt.teacher import update_together

pytestmark = pytest.mark.skipif(
    cpp_backend.missing() is not None, reason="the C++ kernels are not built"
)
ROOT = Path(fastmt.__file__).parents[1]
START = f"""
import sys, threading, time, weakref
sys.path[:0] = [{str(ROOT)!r}]
import torch
from torch import nn
import fastmt

def follow(count):
    student = nn.ModuleList([nn.Linear(4, 4) for _ in range(count)])
    teacher = fastmt.EMATeacher(student, decay=0.9, warmup=None)
    teacher.update()
    return student, teacher
"""
# The last hold on a parameter is C++'s, and its end lets a second binding go.
NESTED = """
student, teacher = follow(1)
others = [parameter.detach().clone() for parameter in student.parameters()]
fastmt.ema_update_(others, list(student.parameters()), 0.9)
student[0].weight = nn.Parameter(torch.zeros(4, 4))
teacher.update()
"""
# The end of a parameter lets another thread run, which looks at what is bound.
BESIDE = """
from fastmt.ema_bound import AVERAGE, Bound, Row

student, teacher = follow(1)
bound = Bound([Row(0, (torch.zeros(4),), torch.ones(4), (AVERAGE,), (None,))])
ended = threading.Event()

def keep_looking():
    while not ended.is_set():
        assert bound.holds()

beside = threading.Thread(target=keep_looking)
beside.start()
weakref.finalize(student[0].weight, time.sleep, 0.1)
student[0].weight = nn.Parameter(torch.zeros(4, 4))
teacher.update()
ended.set()
beside.join()
"""


@pytest.mark.parametrize("program", [NESTED, BESIDE], ids=["by its own end", "beside an update"])
def test_letting_tensors_go_waits_for_nobody(program):
    done = subprocess.run(
        [sys.executable, "-c", START + program],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_memory_that_is_shared_is_refused_as_often_as_it_is_found():
    student = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    teacher = fastmt.EMATeacher(student, decay=0.9, warmup=None)
    teacher.update()
    student[0].weight.data = teacher.module[1].weight.data
    before = student[0].weight.clone()
    with torch.no_grad():
        student[1].weight.add_(1)
    for _ in range(3):
        with pytest.raises(ValueError, match="shares storage"):
            teacher.update()
        assert torch.equal(student[0].weight, before)
    student[0].weight.data = before + 1
    teacher.update()
    torch.testing.assert_close(teacher.module[1].weight, before + 0.1)


def test_memory_found_shared_beside_another_layout_is_refused_later():
    averages, values = ([torch.full((4,), fill) for _ in range(2)] for fill in (0.0, 1.0))
    rows = [
        Row(i, (a,), v, (AVERAGE,), (None,))
        for i, (a, v) in enumerate(zip(averages, values, strict=True))
    ]
    bound, layout = Bound(rows), values[1].data
    values[0].data, values[1].data = averages[1].data, torch.ones(2, 2)
    assert not bound.holds()
    values[1].data = layout
    assert not bound.holds()


def test_a_binding_that_watches_is_not_updated_without_what_it_watches():
    average, value = torch.zeros(4), torch.ones(4)
    bound = Bound([Row(0, (average,), value, (AVERAGE,), (None,))], watch=True)
    assert bound.holds()
    with pytest.raises(RuntimeError, match="the launch failed"):
        bound.run([0.5], [0])
    with pytest.raises(RuntimeError, match="watched: expected"):
        bound.run_with([average], [0.5], [0])
    assert bound.run_with([average, value], [0.5], [0])
    assert torch.equal(average, torch.full((4,), 0.5))
    assert not bound.run_with([average, torch.ones(2, 2)], [0.5], [0])
    assert torch.equal(average, torch.full((4,), 0.5))


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("at", [0, 1, 1999])
def test_memory_that_student_and_teacher_come_to_share_is_refused_before_anything_moves(
    at, watched
):
    student = [torch.ones(3) for _ in range(2000)]  # enough to be shared out to threads
    teacher = [torch.zeros(3) for _ in student]
    module = nn.ParameterList(student)
    average = fastmt.EMATeacher(module, decay=0.5, warmup=None)

    def update():
        if watched:
            fastmt.ema_update_(teacher, student, 0.5)
        else:
            average.update()

    averages = teacher if watched else list(average.module)
    students = student if watched else list(module)
    update()
    before, kept = [a.clone() for a in averages], students[at].data
    students[at].data = averages[(at + 1) % 2000].data
    with pytest.raises(ValueError, match="shares storage"):
        update()
    assert all(map(torch.equal, averages, before))
    students[at].data = kept
    update()


def test_a_float64_teacher_leaves_the_launch_to_the_others():
    torch.manual_seed(0)
    student = Net()
    decays = {torch.float64: 0.5, None: 0.9}
    wide, usual = (
        EMATeacher(student, decay, warmup=None, dtype=dtype) for dtype, decay in decays.items()
    )
    alone = EMATeacher(student, 0.9, warmup=None)
    before = wide.module.first.weight.clone()
    for seed in range(3):
        advance(student, seed)
        update_together([wide, usual])
        alone.update()
        before = 0.5 * before + 0.5 * student.first.weight.double()
    assert_same(usual.module, alone.module)
    torch.testing.assert_close(wide.module.first.weight, before)
    rest = wide._plan._rest.rows
    assert wide._plan._choice.backend() == "cpp"
    assert {row.averages[0].dtype for row in rest} == {torch.float64}
    assert {row.modes[1] for row in rest} == {KEEP}


class Marked(nn.Parameter):
    """A subclass as libraries make them, to tell some parameters from others."""


def test_a_parameter_of_a_subclass_in_front_leaves_the_launch_to_the_others():
    student = nn.Linear(3, 2)
    student.weight, student.bias = Marked(torch.ones(2, 3)), nn.Parameter(torch.ones(2))
    teacher = EMATeacher(student, 0.5, warmup=None)
    averages, values = list(teacher.module.parameters()), list(student.parameters())
    assert isinstance(averages[0], Marked)
    with torch.no_grad():
        values[0].fill_(3), values[1].fill_(5)
    with fastmt.backend("cpp", strict=True):
        teacher.update()
        fastmt.ema_update_(averages, values, 0.5)
    assert (averages[0] == 2.5).all() and (averages[1] == 4).all()
    rest = teacher._plan._rest.rows
    assert len(rest) == 1 and rest[0].averages[0] is averages[0]


def test_a_view_that_negates_when_it_is_read_is_read_anew_at_each_call():
    base = torch.ones(20)
    teacher, student = [torch.zeros(3), torch.zeros(20)], [torch.ones(3), torch._neg_view(base)]
    for value in (1.0, 2.0):
        base.fill_(value)
        fastmt.ema_update_(teacher, student, 0.0)
        assert (teacher[1] == -value).all()


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), nn.Linear(2, 2).state_dict(), None])
def test_what_holds_no_tensors_is_named(wrong):
    kind = type(wrong).__name__
    with pytest.raises(TypeError, match=f"^teacher: got {kind}, expected a sequence of tensors"):
        fastmt.ema_update_(wrong, [torch.ones(1)], 0.5)
    with pytest.raises(TypeError, match=f"^student: got {kind}, expected a sequence of tensors"):
        fastmt.ema_update_([torch.ones(1)], wrong, 0.5)
