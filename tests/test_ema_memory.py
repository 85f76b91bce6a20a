"""The moving average of tensors whose memory changes after they were averaged once."""

from __future__ import annotations

import pytest
import torch
from test_ema import implementation  # noqa: F401

import fastmt


def test_values_behind_a_new_data_pointer_are_found():
    teacher = torch.nn.Parameter(torch.zeros(3))
    student = torch.nn.Parameter(torch.ones(3))
    fastmt.ema_update_([teacher], [student], 0.5)
    student.data = torch.full((3,), 8.0)
    fastmt.ema_update_([teacher], [student], 0.0)
    assert torch.equal(teacher.detach(), torch.full((3,), 8.0))
    teacher.data = torch.zeros(3)
    fastmt.ema_update_([teacher], [student], 0.5)
    assert torch.equal(teacher.detach(), torch.full((3,), 4.0))


@pytest.mark.parametrize("place", [0, 1])
def test_a_new_shape_behind_the_same_pointer_is_noticed(place):
    dtypes = (torch.float32, torch.float64)  # what the kernels take, and what they leave
    teacher, student = ([make(9, dtype=d) for d in dtypes] for make in (torch.zeros, torch.ones))
    fastmt.ema_update_(teacher, student, 0.5)
    student[place].data = student[place].data[:1]
    with pytest.raises(ValueError, match=rf"^student\[{place}\]: got shape \(1\), expected \(9\)"):
        fastmt.ema_update_(teacher, student, 0.5)


def test_a_new_dtype_behind_the_same_pointer_is_noticed():
    teacher, student = torch.zeros(100), torch.ones(200)[:100]
    fastmt.ema_update_([teacher], [student], 0.5)
    student.data = student.data.view(torch.float16)[:100].fill_(3)
    fastmt.ema_update_([teacher], [student], 0.0)
    assert torch.equal(teacher, torch.full((100,), 3.0))


def test_new_strides_behind_the_same_pointer_are_noticed():
    teacher, student = torch.zeros(3, 4), torch.arange(12.0).view(3, 4)
    fastmt.ema_update_([teacher], [student], 0.5)
    student.data = student.data.as_strided((3, 4), (1, 3))
    fastmt.ema_update_([teacher], [student], 0.0)
    assert torch.equal(teacher, student)


@pytest.mark.parametrize("offset", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_that_becomes_shared_is_refused(offset, dtype):
    teacher = [torch.zeros(3), torch.zeros(16, dtype=dtype)[:8], torch.zeros(8, dtype=dtype)]
    student = [torch.ones_like(average) for average in teacher]
    fastmt.ema_update_(teacher, student, 0.5)
    student[2].data = teacher[1].as_strided((8,), (1,), offset)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^student\[2\]: shares storage"):
            fastmt.ema_update_(teacher, student, 0.5)


def test_tensors_that_become_tied_are_averaged_once():
    teacher, student = [torch.zeros(8), torch.zeros(8)], [torch.ones(8), torch.ones(8)]
    fastmt.ema_update_(teacher, student, 0.0)
    teacher[1].data = teacher[0].data.zero_()
    fastmt.ema_update_(teacher, student, 0.5)
    assert torch.equal(teacher[1], torch.full((8,), 0.5))


def test_tensors_that_are_tied_no_more_are_each_averaged():
    teacher, student = [torch.zeros(8) for _ in range(3)], [torch.ones(8) for _ in range(3)]
    teacher[2].data = teacher[1].data
    fastmt.ema_update_(teacher, student, 0.5)
    teacher[2].data = torch.zeros(8)
    fastmt.ema_update_(teacher, student, 0.5)
    assert torch.equal(teacher[1], torch.full((8,), 0.75))
    assert torch.equal(teacher[2], torch.full((8,), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_that_was_empty_is_averaged_once_it_is_not(dtype):
    teacher = [torch.zeros(3), torch.zeros(0, dtype=dtype)]
    student = [torch.ones_like(average) for average in teacher]
    fastmt.ema_update_(teacher, student, 0.5)
    teacher[1].data, student[1].data = torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)
    fastmt.ema_update_(teacher, student, 0.5)
    assert (teacher[1] == 0.5).all()


def test_a_tensor_without_elements_has_no_two_of_them_in_one_place():
    teacher = [torch.zeros(3), torch.zeros(1, 0).expand(4, 0)]
    fastmt.ema_update_(teacher, [torch.ones(3), torch.zeros(4, 0)], 0.5)
    assert (teacher[0] == 0.5).all()


@pytest.mark.parametrize(("offset", "left"), [(0, 0), (0, 4), (8, 40)])
def test_memory_that_is_gone_is_never_touched(offset, left, kernels):
    teacher, student = [torch.zeros(8), torch.zeros(8)], [torch.ones(8), torch.ones(16)[offset:]]
    student[1] = student[1][:8]
    fastmt.ema_update_(teacher, student, 0.5)
    student[1].untyped_storage().resize_(left)
    with pytest.raises((RuntimeError, ValueError)):
        fastmt.ema_update_(teacher, student, 0.5)
