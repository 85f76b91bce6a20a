"""Which tensors the teacher follows, and what shows that the student has changed."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from followed import Net, advance, assert_same, follow
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastmt import EMATeacher, backend, decays
from fastmt.teacher import update_together


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(params=["auto", "eager"], autouse=True)
def implementation(request):
    with backend(request.param):
        yield


def test_200_random_steps_agree_with_averaged_model(student):
    teacher = EMATeacher(student, 0.95, warmup=None)
    other = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=False)
    other.n_averaged.fill_(1)
    for seed in range(200):
        advance(student, seed)
        teacher.update()
        other.update_parameters(student)
    for ours, theirs in zip(teacher.module.parameters(), other.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert teacher.module.norm.num_batches_tracked == 200


SCHEDULES = {
    "constant": {"decay": 0.9, "warmup": None},
    "reciprocal": {"decay": 0.9, "warmup": "reciprocal"},
    "tenths": {"decay": 0.9, "warmup": "tenths"},
    "power": {"decay": 0.9, "warmup": "power"},
    "power function": {"decay": decays.PowerFunction(3.0)},
    "cosine": {"decay": decays.Cosine(0.5, 20)},
    "callable": {"decay": lambda t: 0.25 + t / 100},
    "half-life in steps": {"half_life": 5, "warmup": None},
    "half-life in images": {"half_life": 40, "images_per_step": 8, "warmup": None},
}
CLOSED_FORMS = {
    "constant": lambda t: 0.9,
    "reciprocal": lambda t: min(t / (t + 1), 0.9),
    "tenths": lambda t: min((1 + t) / (10 + t), 0.9),
    "power": lambda t: min(1 - (1 + t) ** (-2 / 3), 0.9),
    "power function": lambda t: (t / (t + 1)) ** 4,
    "cosine": lambda t: 1 - 0.25 * (1 + torch.cos(torch.tensor(torch.pi * min(t, 20) / 20)).item()),
    "callable": lambda t: 0.25 + t / 100,
    "half-life in steps": lambda t: 2 ** (-1 / 5),
    "half-life in images": lambda t: 2 ** (-8 / 40),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_schedule_follows_its_closed_form_in_float64(student, name):
    teacher = EMATeacher(student, **SCHEDULES[name])
    expected = student.first.weight.detach().double()
    for step, seen in enumerate(follow(teacher, student, 30)):
        decay = CLOSED_FORMS[name](step)
        expected = decay * expected + (1 - decay) * seen["first.weight"].double()
    torch.testing.assert_close(teacher.module.first.weight.double(), expected, atol=2e-6, rtol=0)


def test_a_replaced_parameter_is_followed(student):
    teacher = EMATeacher(student, 0.5, warmup=None)
    teacher.update()
    for value in (2.0, 3.0):
        student.first.bias = nn.Parameter(torch.full((4,), value))
        teacher.module.first.bias.zero_()
        teacher.update()
        assert torch.equal(teacher.module.first.bias, torch.full((4,), value / 2))


def test_a_replaced_parameter_of_one_element_and_the_same_value_is_followed():
    student = nn.Linear(1, 1)
    teacher = EMATeacher(student, 0.5, warmup=None)
    teacher.update()
    student.bias = nn.Parameter(student.bias.detach().clone())
    teacher.update()
    with torch.no_grad():
        student.bias.fill_(8)
        teacher.module.bias.zero_()
    teacher.update()
    assert teacher.module.bias == 4


def test_a_moved_resized_or_retyped_parameter_is_noticed(student):
    teacher = EMATeacher(student, 0.0, warmup=None)
    teacher.update()
    student.first.bias.data = torch.full((4,), 7.0)
    teacher.update()
    assert torch.equal(teacher.module.first.bias, torch.full((4,), 7.0))
    student.first.bias.data = torch.full((4,), 5.0, dtype=torch.bfloat16)
    teacher.update()
    assert torch.equal(teacher.module.first.bias, torch.full((4,), 5.0))
    student.first.bias.data = student.first.bias.data[:3]
    with pytest.raises(ValueError, match="^student: 'first.bias' has shape"):
        teacher.update()


def test_a_replaced_module_is_followed_and_an_added_one_named(student):
    teacher = EMATeacher(student, 0.0, warmup=None)
    teacher.update()
    student.first = nn.Linear(3, 4)
    teacher.update()
    assert torch.equal(teacher.module.first.weight, student.first.weight)
    student.first.adapter = nn.Linear(1, 1, bias=False)
    with pytest.raises(ValueError, match="^student: 'first.adapter.weight' is missing in the te"):
        teacher.update()


def add(parameter):
    with torch.no_grad():
        parameter.add_(1)


def add_past_autograd(parameter):
    parameter.data.add_(1)


@pytest.mark.parametrize("change", [add, add_past_autograd])
def test_a_frozen_parameter_that_changes_is_averaged_and_else_stays_as_it_is(student, change):
    student.first.requires_grad_(False)
    teacher = EMATeacher(student, 0.9, warmup=None)
    before = teacher.module.first.bias.clone()
    for _ in range(3):
        teacher.update()
    assert torch.equal(teacher.module.first.bias, before)
    change(student.first.bias)
    teacher.update()
    torch.testing.assert_close(teacher.module.first.bias, before + 0.1)
    teacher.update()
    torch.testing.assert_close(teacher.module.first.bias, before + 0.19)


def test_shared_storage_is_refused_by_name(student):
    teacher = EMATeacher(student)
    teacher.module.first.bias.data = student.first.bias.data
    with pytest.raises(ValueError, match="^student: 'first.bias' shares storage"):
        teacher.update()


def test_a_teacher_made_half_precision_later_is_refused(student):
    teacher = EMATeacher(student)
    teacher.to(torch.bfloat16)
    with pytest.raises(TypeError, match="^teacher: '.*' is torch.bfloat16.*rounding="):
        teacher.update()


def test_several_teachers_in_one_launch_equal_each_alone(student):
    options = [
        {"decay": 0.9},
        {"decay": 0.5, "warmup": None, "buffers": "ema"},
        {"decay": 0.7, "update_every": 3, "buffers": "keep"},
    ]
    together = [EMATeacher(student, **o) for o in options]
    alone = [EMATeacher(student, **o) for o in options]
    for seed in range(10):
        advance(student, seed)
        update_together(together)
        for teacher in alone:
            teacher.update()
    for left, right in zip(together, alone, strict=True):
        assert_same(left.module, right.module)
        assert (left.calls, left.updates) == (right.calls, right.updates)


def test_the_students_tensors_are_freed_with_the_student():
    student = Net()
    teacher = EMATeacher(student)
    teacher.update()
    parameter = weakref.ref(student.first.weight)
    del student
    gc.collect()
    assert parameter() is None
    assert teacher._plan is None


def test_a_teacher_is_freed_at_once_and_lets_go_of_the_students_tensors(student):
    teacher = EMATeacher(student)
    teacher.update()
    ends = weakref.ref(teacher), weakref.ref(student.first.bias)
    gc.disable()  # a cycle would wait for it
    try:
        del teacher
        student.first.bias = None
        assert [end() for end in ends] == [None, None]
    finally:
        gc.enable()


def test_versions_are_bumped_so_that_autograd_notices(student):
    teacher = EMATeacher(student, 0.5, warmup=None)
    x = torch.ones(2, 4, requires_grad=True)
    loss = nn.functional.linear(x, teacher.module.last.weight).sum()
    advance(student, 1)
    teacher.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_teacher_averages_a_student_that_carries_a_teachers_weights(student):
    teachers = [EMATeacher(student) for _ in range(2)]
    advance(student, 0)
    with teachers[0].swapped():
        for teacher in teachers:
            with pytest.raises(RuntimeError, match="^update: the student carries"):
                teacher.update()
            with pytest.raises(RuntimeError, match="^swapped: "), teacher.swapped():
                pass
        with pytest.raises(RuntimeError, match="^update: the student carries"):
            update_together(teachers[::-1])
        EMATeacher(Net()).update(student=Net())
    update_together(teachers)
    assert_same(teachers[1].module, student)


def test_teachers_of_different_students_are_refused_unless_one_is_given(student):
    other = Net()
    teachers = [EMATeacher(student), EMATeacher(other)]
    with pytest.raises(ValueError, match="^teachers: got teachers of different students"):
        update_together(teachers)
    assert_same(teachers[1].module, other)
    update_together(teachers, student=student)
    assert_same(teachers[1].module, student)


def test_teachers_and_decays_that_do_not_fit_are_refused_and_nothing_is_averaged(student):
    teacher = EMATeacher(student)
    with pytest.raises(ValueError, match="^teachers: got one twice"):
        update_together([teacher, teacher])
    with pytest.raises(ValueError, match="^teachers: got none"):
        update_together([])
    with pytest.raises(ValueError, match="^decays: got 2, expected 1, one a teacher"):
        update_together([teacher], decays=[0.5, 0.5])
    assert teacher.calls == 0


def test_an_attached_teacher_updates_after_each_step_that_is_not_skipped(student):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    teacher = EMATeacher(student)
    handle = teacher.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for poison, updates in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        optimizer.zero_grad()
        scaler.scale(student.first.weight.sum() * poison).backward()
        scaler.step(optimizer)
        scaler.update()
        assert teacher.updates == updates
    handle.remove()
    optimizer.step()
    assert teacher.updates == 2


def test_a_step_that_a_fused_optimiser_skips_on_the_device_changes_nothing(student):
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1, fused=True)
    teacher = EMATeacher(student, 0.5, warmup=None)
    teacher.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(teacher.module)
    scaler.scale(student.first.weight.sum() * float("inf")).backward()
    scaler.step(optimizer)
    assert_same(teacher.module, before)
    assert teacher.updates == 0


def test_checkpoints_of_averaged_model_and_timm_load(student):
    other = AveragedModel(student)
    advance(student, 3)
    other.update_parameters(student)
    for state in (
        copy.deepcopy(other.state_dict()),
        {"state_dict": Net().state_dict(), "state_dict_ema": other.module.state_dict()},
        {f"_orig_mod.{n}": t for n, t in other.module.state_dict().items()},
    ):
        teacher = EMATeacher(Net())
        teacher.load_state_dict(state)
        assert_same(teacher.module, other.module)
    assert EMATeacher(Net()).load_state_dict(other.state_dict()) is not None


def test_a_compiled_submodule_matches_by_name(student):
    teacher = EMATeacher(student, 0.0, warmup=None)
    student.first = torch.compile(student.first, backend="eager")
    teacher.update()
    assert torch.equal(teacher.module.first.weight, student.first._orig_mod.weight)
