"""Which tensors a teacher follows, and what it says of those that it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmt import EMATeacher, backend

pytestmark = pytest.mark.filterwarnings("ignore:.*(quantize|Sparse).*")
UNUSUAL = {
    "torch.sparse_coo": lambda: torch.eye(3).to_sparse(),
    "torch.qint8": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.fixture(params=["auto", "eager"], autouse=True)
def backends(request):
    with backend(request.param):
        yield


def with_buffer(buffer: torch.Tensor) -> nn.Module:
    student = nn.Linear(3, 2)
    student.register_buffer("extra", buffer)
    return student


@torch.no_grad()
def assert_follows(teacher: EMATeacher, student: nn.Module) -> None:
    teacher.update()
    student.weight.fill_(3.0)
    expected = teacher.module.weight.lerp(student.weight, 1 - teacher.current_decay())
    teacher.update()
    torch.testing.assert_close(teacher.module.weight, expected)


def test_a_network_without_memory_is_named_as_such_and_followed_once_it_has_some():
    with torch.device("meta"):
        student = nn.Linear(3, 2)
    teacher = EMATeacher(student)
    with pytest.raises(ValueError, match="student: 'weight' is on the meta device"):
        teacher.update()
    student.to_empty(device="cpu")
    with pytest.raises(ValueError, match="teacher: 'weight' is on the meta device"):
        teacher.update()
    teacher.to_empty(device="cpu")
    for network in (student, teacher.module):
        network.reset_parameters()
    assert_follows(teacher, student)


@pytest.mark.parametrize("kind", UNUSUAL)
def test_a_buffer_that_is_not_dense_is_named_and_left_alone_where_buffers_are_kept(kind):
    student = with_buffer(UNUSUAL[kind]())
    teacher = EMATeacher(student)
    with pytest.raises(TypeError, match=f"student: 'extra' is {kind}.*buffers='keep'"):
        teacher.update()
    assert_follows(EMATeacher(student, buffers="keep"), student)


def test_a_student_may_make_buffers_of_its_own_where_buffers_are_kept():
    student = nn.Linear(3, 2)
    teacher = EMATeacher(student, buffers="keep")
    student.register_buffer("cache", torch.ones(4))
    assert_follows(teacher, student)


@pytest.mark.parametrize("rule", ["copy", "ema", "keep"])
def test_a_parameter_that_is_a_buffer_as_well_is_averaged_once(rule):
    student = nn.Linear(3, 2)
    student.register_buffer("again", student.weight)
    teacher = EMATeacher(student, buffers=rule)
    assert_follows(teacher, student)
    assert teacher.module.again is teacher.module.weight
