"""What counts as an update, with what decay it goes on, and what of it a checkpoint keeps."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from followed import Net, NoHostReads, advance, assert_same, follow
from torch import nn

from fastmt import EMATeacher, backend, decays, teacher_count
from fastmt.teacher import update_together

FINITE = (False, True, True, False, False, True, True, False, True, True)
OPTIONS = {
    "reciprocal": {"decay": 0.9},
    "tenths": {"decay": 0.9, "warmup": "tenths"},
    "callable": {"decay": decays.Cosine(0.3, 6)},
    "start": {"decay": 0.9, "start": 2},
    "update_every": {"decay": 0.8, "update_every": 2, "start": 1},
    "stochastic": {"decay": 0.9, "dtype": torch.bfloat16, "rounding": "stochastic"},
}


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(autouse=True)
def reference():
    """The device's half of an update is the reference's on a CPU: compare with the same."""
    with backend("eager"):
        yield


def by_the_host(teacher, finite, patch):
    teacher.update(finite=finite)


def by_a_given_decay(teacher, finite, patch):
    teacher.update(finite=finite, decay=teacher.put_decay()[0])


def by_the_device(teacher, finite, patch):
    patch.setattr("fastmt.teacher_update._is_on_host", lambda finite: False)
    teacher.update(finite=finite)


def by_a_graph(teacher, finite, patch):
    teacher.advance()
    patch.setattr("fastmt.teacher_update.is_capturing", lambda: True)
    by_the_device(teacher, finite, patch)  # what the graph would hold, and do again


ON_DEVICE = (by_a_given_decay, by_the_device, by_a_graph)


def made(**options):
    """A teacher, and its student, which is the same each time."""
    torch.manual_seed(0)
    student = Net()
    return EMATeacher(student, **options), student


def train(teacher, student, update, monkeypatch, pattern=FINITE):
    for seed, finite in enumerate(pattern):
        advance(student, seed)
        with monkeypatch.context() as patch, NoHostReads(allowed=update is by_the_host):
            update(teacher, torch.tensor(finite), patch)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("update", ON_DEVICE)
def test_an_update_that_only_the_device_knows_was_skipped_counts_nowhere(
    options, update, monkeypatch
):
    (expected, first), (teacher, second) = made(**options), made(**options)
    train(expected, first, by_the_host, monkeypatch)
    train(teacher, second, update, monkeypatch)
    assert_same(teacher.module, expected.module)
    assert teacher.current_decay() == expected.current_decay()
    assert teacher.progress() == expected.progress()
    train(expected, first, by_the_host, monkeypatch, FINITE[3:])
    train(teacher, second, update, monkeypatch, FINITE[3:])
    assert_same(teacher.module, expected.module)


@pytest.mark.parametrize("update", [by_the_host, *ON_DEVICE])
def test_the_first_student_is_taken_whole_also_after_skipped_updates(student, update, monkeypatch):
    teacher = EMATeacher(student)
    train(teacher, student, update, monkeypatch, (False, False, True))
    assert_same(teacher.module, student)


def test_updates_without_a_flag_go_on_by_the_devices_count(monkeypatch):
    (expected, first), (teacher, second) = made(), made()
    train(expected, first, by_the_host, monkeypatch, FINITE[:5])
    train(teacher, second, by_the_device, monkeypatch, FINITE[:5])
    follow(expected, first, 3)
    follow(teacher, second, 3)
    assert_same(teacher.module, expected.module)


def test_a_given_decay_alone_tells_whether_a_call_averages(student):
    teacher = EMATeacher(student, update_every=3)
    before = copy.deepcopy(teacher.module)
    advance(student, 0)
    teacher.update(decay=torch.tensor(-1.0, dtype=torch.float64))
    assert_same(teacher.module, before)
    teacher.update(decay=torch.tensor(0.0, dtype=torch.float64))
    assert_same(teacher.module, student)


def test_teachers_in_one_launch_each_leave_out_what_was_skipped(student, monkeypatch):
    options = ({"decay": 0.9}, {"decay": 0.7, "update_every": 3}, {"decay": 0.5, "warmup": None})
    alone, together = ([EMATeacher(student, **o) for o in options] for _ in range(2))
    for seed, finite in enumerate(map(torch.tensor, FINITE)):
        advance(student, seed)
        for teacher in alone:
            teacher.update(finite=finite)
        with monkeypatch.context() as patch:
            patch.setattr("fastmt.teacher_update._is_on_host", lambda finite: False)
            update_together(together, finite=finite)
    for left, right in zip(together, alone, strict=True):
        assert_same(left.module, right.module)
        assert left.progress() == right.progress()


def test_the_table_of_decays_is_used_again_from_its_start(monkeypatch):
    monkeypatch.setattr(teacher_count.DeviceCount, "LENGTH", 8)
    (expected, first), (teacher, second) = made(), made()
    pattern = (*FINITE, *(True,) * 9, False, True)
    train(expected, first, by_the_host, monkeypatch, pattern)
    train(teacher, second, by_the_device, monkeypatch, pattern)
    assert_same(teacher.module, expected.module)


def test_a_count_that_was_set_goes_on_from_there(student):
    teacher = EMATeacher(student, decay=0.99)
    teacher.put_decay()
    teacher.calls = teacher.updates = 40
    teacher._count_on(None).skip(torch.tensor(False))  # 39 lies before what was put
    assert teacher.put_decay()[0] == 1 - 1 / 41
    assert teacher.current_decay() == 1 - 1 / 40


def test_saving_or_moving_a_teacher_leaves_what_was_skipped_out_of_its_counts(student, monkeypatch):
    for save in (EMATeacher.state_dict, copy.deepcopy, EMATeacher.cpu):
        teacher = EMATeacher(student)
        train(teacher, student, by_the_device, monkeypatch)
        assert teacher.calls == len(FINITE)
        save(teacher)
        assert teacher.calls == teacher.updates == sum(FINITE)


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize("name", ["decay", "warmup"])
def test_a_callable_that_gives_no_decay_is_named_and_nothing_changes(student, name, bad):
    teacher = EMATeacher(student, **{name: lambda t: bad if t == 1 else 0.5})
    teacher.update()
    before = copy.deepcopy(teacher.module)
    advance(student, 0)
    with pytest.raises(ValueError, match=f"^{name}: gave {bad} for update 1, expected"):
        teacher.update()
    assert_same(teacher.module, before)
    assert teacher.calls == 1


@pytest.mark.parametrize("warmup", [*decays.WARMUPS, None])
@pytest.mark.parametrize("start", [0, 5])
def test_a_loaded_average_is_kept_as_its_warm_up_is_over(student, warmup, start):
    saved = EMATeacher(student, 0.99)
    follow(saved, student, 3)
    teacher = EMATeacher(Net(), 0.99, warmup=warmup, start=start)
    teacher.load_state_dict(saved.state_dict())
    before = saved.module.first.weight.detach()
    teacher.update(student=student)
    expected = before.lerp(student.first.weight.detach(), 0.01)
    torch.testing.assert_close(teacher.module.first.weight.detach(), expected)


KEPT = {
    **OPTIONS,
    "power function": {"decay": decays.PowerFunction(3.0)},
    "kahan": {"decay": 0.9, "dtype": torch.float16, "rounding": "kahan"},
}


@pytest.mark.parametrize("options", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("update", [by_the_host, by_the_device])
def test_with_its_progress_a_loaded_teacher_is_that_of_an_uninterrupted_run(
    options, update, monkeypatch
):
    (teacher, first), (other, second) = made(**options), made(**options)
    train(teacher, first, update, monkeypatch)
    train(other, second, update, monkeypatch, FINITE[:5])
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(teacher.state_dict()))
    other.load_progress(copy.deepcopy(teacher.progress()))
    train(teacher, first, update, monkeypatch, FINITE[-6:])
    train(other, second, update, monkeypatch, FINITE[-6:])
    assert_same(other.module, teacher.module)
    assert other.current_decay() == teacher.current_decay()


def test_the_warm_up_begins_anew_where_progress_says_so(student):
    teacher = EMATeacher(student)
    teacher.load_state_dict(Net().state_dict())
    teacher.load_progress({"calls": 0, "updates": 0})
    teacher.update()
    assert_same(teacher.module, student)


def test_a_callable_schedule_goes_on_where_it_was_after_a_load(student):
    asked = []
    teacher = EMATeacher(student, lambda t: asked.append(t) or 0.5, start=1)
    follow(teacher, student, 3)
    teacher.load_state_dict(Net().state_dict())
    teacher.update()
    assert asked == [0, 1, 2]


def test_a_state_dict_without_the_teacher_leaves_its_count(student):
    holder = nn.ModuleDict({"student": student, "teacher": EMATeacher(student)})
    follow(holder["teacher"], student, 2)
    holder.load_state_dict(nn.ModuleDict({"student": Net()}).state_dict(), strict=False)
    assert holder["teacher"].updates == 2


def test_n_averaged_is_the_number_of_updates_also_after_a_start(student):
    teacher = EMATeacher(student, start=7, update_every=2)
    state = {f"module.{name}": tensor for name, tensor in Net().state_dict().items()}
    teacher.load_state_dict({"n_averaged": torch.tensor(3), **state})
    assert (teacher.calls, teacher.updates, teacher.current_decay()) == (13, 3, 0.75)


def test_a_warm_up_is_over_after_its_length_and_not_after_half_of_it():
    for warmup, decay in itertools.product(decays.WARMUPS, (0.5, 0.99, 0.9999)):
        schedule, length = decays.warmed_up(warmup, decay), decays.warmup_length(warmup, decay)
        assert schedule(length) == decay > schedule(length // 2)
    assert decays.warmup_length(None, 0.9) == 0


def test_a_count_that_inference_mode_began_goes_on_outside_it(student):
    captured, given = EMATeacher(student), EMATeacher(student)
    options = {"finite": torch.tensor(False), "decay": torch.tensor(0.5, dtype=torch.float64)}
    with torch.inference_mode():
        captured.advance()
        given.update(**options)
    captured.advance()
    given.update(**options)
    assert (captured.progress()["updates"], given.progress()["updates"]) == (2, 0)


def test_what_rounding_loses_is_kept_also_where_inference_mode_made_the_first_update(student):
    with backend("eager"):
        teacher = EMATeacher(student, 0.9, dtype=torch.bfloat16, rounding="kahan")
        with torch.inference_mode():
            teacher.update()
        follow(teacher, student, 2)
    assert teacher.updates == 3
