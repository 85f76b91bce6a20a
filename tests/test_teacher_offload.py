"""A teacher on the CPU of a student elsewhere: here a CPU student whose copies are forced.

Pinned memory and copies that run beside the GPU's work are only exercised where there is a GPU.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from followed import Net, advance, assert_same
from torch import nn

from fastmt import EMATeacher, ema_plan, ema_staging
from fastmt.ema_bound import AVERAGE, Row
from fastmt.teacher import update_together


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def offloaded(monkeypatch):
    monkeypatch.setattr(ema_plan, "_is_offloaded", lambda row: True)


READS = {
    "flush": lambda teacher: teacher.flush(),
    "forward": lambda teacher: teacher(torch.zeros(2, 3)),
    "state_dict": lambda teacher: teacher.state_dict(),
    "copy_to": lambda teacher: teacher.copy_to(Net()),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "to": lambda teacher: teacher.to(torch.float32),
}


def expected_after(steps, **options):
    torch.manual_seed(0)
    network = Net()
    teacher = EMATeacher(network, 0.9, **options)
    for seed in range(steps):
        advance(network, seed)
        teacher.update()
    teacher.flush()
    return teacher.module


@pytest.mark.parametrize("read", READS)
def test_the_average_is_that_of_the_student_at_each_update(student, offloaded, read):
    teacher = EMATeacher(student, 0.9, device="cpu")
    for seed in range(5):
        advance(student, seed)
        teacher.update()
        advance(student, 100 + seed)  # what the student becomes later is none of this update
    READS[read](teacher)
    torch.manual_seed(0)
    other = Net()
    expected = EMATeacher(other, 0.9)
    for seed in range(5):
        advance(other, seed)
        expected.update()
        expected.flush()
        advance(other, 100 + seed)
    assert_same(teacher.module, expected.module)


def test_update_leaves_the_average_to_be_made_later(student, offloaded):
    teacher = EMATeacher(student, 0.9, device="cpu")
    before = copy.deepcopy(teacher.module)
    advance(student, 0)
    teacher.update()
    assert_same(teacher.module, before)
    teacher.flush()
    assert_same(teacher.module, expected_after(1))
    teacher.flush()
    assert_same(teacher.module, expected_after(1))


def test_updates_that_the_students_device_finds_skipped_count_nowhere(
    student, offloaded, monkeypatch
):
    monkeypatch.setattr("fastmt.teacher_update._is_on_host", lambda finite: False)
    teacher = EMATeacher(student, 0.9, device="cpu", update_every=2)
    for seed, finite in enumerate((False, True, True, False, True)):
        if finite:
            advance(student, seed)
        teacher.update(finite=torch.tensor(finite))
    torch.manual_seed(0)
    other = Net()
    expected = EMATeacher(other, 0.9, update_every=2)
    for seed in (1, 2, 4):
        advance(other, seed)
        expected.update()
    assert teacher.progress() == expected.progress()  # which flushes
    assert_same(teacher.module, expected.module)


def test_swapped_carries_the_last_average(student, offloaded):
    teacher = EMATeacher(student, 0.9, device="cpu")
    for seed in range(3):
        advance(student, seed)
        teacher.update()
    with teacher.swapped():
        assert_same(student, expected_after(3))


def test_several_teachers_each_see_their_last_average(student, offloaded):
    teachers = [EMATeacher(student, 0.9, device="cpu") for _ in range(2)]
    for seed in range(3):
        advance(student, seed)
        update_together(teachers)
    second = copy.deepcopy(teachers[1].state_dict())
    for name, tensor in expected_after(3).state_dict().items():
        assert torch.equal(second[name], tensor)


def test_teachers_on_both_sides_of_a_gpu_are_refused_together():
    on_host, elsewhere = torch.zeros(1), torch.zeros(1, device="meta")  # for a GPU
    for averages in ((on_host, elsewhere), (elsewhere, on_host)):
        with pytest.raises(ValueError, match="^teachers: got some on the CPU and some on the GPU"):
            ema_plan._is_offloaded(Row(0, averages, elsewhere, (AVERAGE,) * 2, (None,) * 2))
        assert not ema_plan._is_offloaded(Row(0, averages, on_host, (AVERAGE,) * 2, (None,) * 2))


def test_teachers_updated_together_and_alone_in_turn_lose_no_average(student, offloaded):
    decays = {"slow": 0.9, "fast": 0.5}
    late, prompt = (
        {name: EMATeacher(student, decay, device=device) for name, decay in decays.items()}
        for device in ("cpu", None)
    )
    for seed, names in enumerate([("fast",), ("slow", "fast"), ("fast",), ("slow", "fast")] * 2):
        advance(student, seed)
        update_together([late[name] for name in names])
        for name in names:
            prompt[name].update()
            prompt[name].flush()
    for name in decays:
        late[name].flush()
        assert_same(late[name].module, prompt[name].module)


def test_the_students_tensors_are_freed_with_the_student(offloaded):
    network = Net()
    teachers = [EMATeacher(network, device="cpu") for _ in range(2)]
    update_together(teachers)
    parameter = weakref.ref(network.first.weight)
    del network
    gc.collect()
    assert parameter() is None


def test_a_replaced_parameter_is_followed_after_what_was_on_its_way(student, offloaded):
    teacher = EMATeacher(student, 0.5, warmup=None, device="cpu")
    with torch.no_grad():
        student.first.bias.fill_(8)
        teacher.module.first.bias.zero_()
    teacher.update()
    student.first.bias = torch.nn.Parameter(torch.zeros(4))
    teacher.update()
    teacher.flush()
    assert torch.equal(teacher.module.first.bias, torch.full((4,), 2.0))


def test_a_resized_parameter_is_named(student, offloaded):
    teacher = EMATeacher(student, device="cpu")
    teacher.update()
    student.first.bias.data = torch.zeros(7)
    with pytest.raises(ValueError, match="^student: 'first.bias' has shape"):
        teacher.update()


def test_a_capture_is_refused(student, offloaded, monkeypatch):
    teacher = EMATeacher(student, device="cpu")
    teacher.advance()
    monkeypatch.setattr("fastmt.teacher_update.is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="^update: an update of a teacher on the CPU"):
        teacher.update()


def test_a_teacher_on_the_cpu_of_a_cpu_student_is_averaged_at_once(student):
    teacher = EMATeacher(student, 0.9, device="cpu")
    advance(student, 0)
    teacher.update()
    assert teacher._plan.staging is None
    assert_same(teacher.module, expected_after(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_student_on_a_gpu_is_averaged_on_the_cpu():
    torch.manual_seed(0)
    student = Net().cuda()
    teacher = EMATeacher(student, 0.9, device="cpu")
    for seed in range(4):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(seed + 1.0)
        teacher.update(finite=torch.tensor(seed != 2, device="cuda"))
    torch.manual_seed(0)
    other = Net()
    expected = EMATeacher(other, 0.9)
    for seed in range(4):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(seed + 1.0)
        if seed != 2:
            expected.update()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(teacher.state_dict()[name], tensor)


def test_copies_of_every_gpu_are_waited_for(monkeypatch):
    recorded, waited = [], []

    class Event:
        def record(self, stream):
            self.stream = stream
            recorded.append(stream)

        def synchronize(self):
            waited.append(self.stream)

    class Value:
        def __init__(self, name):
            self.device = torch.device(name)

        def copy_(self, *_, **__):
            return self

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", str)
    staging = ema_staging.Staging([])
    staging._values = list(map(Value, ("cuda:0", "cuda:1", "cpu", "cuda:1")))
    staging.copies = staging._values
    staging.fill([0.5], [0])
    assert sorted(recorded) == ["cuda:0", "cuda:1"]
    assert staging.empty() == ([0.5], [0])
    assert sorted(waited) == ["cuda:0", "cuda:1"]


def test_a_network_in_another_layout_still_gets_the_average_that_is_owed(offloaded):
    student = nn.Conv2d(3, 4, 3)
    teacher = EMATeacher(student, 0.9, device="cpu")
    with torch.no_grad():
        student.weight.fill_(2.0)
    teacher.update()
    teacher.module.to(memory_format=torch.channels_last)
    teacher.flush()
    assert torch.equal(teacher.module.weight, student.weight)
    with torch.no_grad():
        student.weight.fill_(4.0)
    teacher.update()
    teacher.module.double()
    teacher.flush()
    assert (teacher.module.weight == 3.0).all()
