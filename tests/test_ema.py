"""The moving average of many tensors: closed form, dtypes, layouts, tensors that come and go."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import DTYPES, LAYOUTS, laid_out, random_logits
from tolerances import assert_average_close

import fastmt


@pytest.fixture(params=["auto", "eager"], autouse=True)
def implementation(request):
    """The launch (with the reference for what it does not serve), and the reference alone."""
    with fastmt.backend(request.param):
        yield


def averaged(teacher, student, decay):
    return decay * teacher.double() + (1 - decay) * student.double()


@settings(max_examples=60)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=6),
    teacher_dtype=st.sampled_from([*DTYPES, torch.float64]),
    student_dtype=st.sampled_from([*DTYPES, torch.float64]),
    layouts=st.tuples(st.sampled_from(LAYOUTS[:-1]), st.sampled_from(LAYOUTS)),
    decay=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    as_tensor=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_is_the_weighted_mean(
    shapes, teacher_dtype, student_dtype, layouts, decay, as_tensor, seed
):
    def tensors(dtype, layout, first):
        made = [random_logits(s, first + i, dtype=dtype) for i, s in enumerate(shapes)]
        return [
            laid_out(t, layout, class_dim=t.ndim > 2) if t.ndim and t.numel() else t for t in made
        ]

    teacher = tensors(teacher_dtype, layouts[0], seed)
    student = tensors(student_dtype, layouts[1], seed + 50)
    for share in (decay, 0.75):  # the second time they are bound
        expected = [averaged(t, s, share) for t, s in zip(teacher, student, strict=True)]
        before = [s.clone() for s in student]
        given = torch.tensor(share, dtype=torch.float64) if as_tensor else share
        fastmt.ema_update_(teacher, student, given)
        for i, average in enumerate(teacher):
            assert_average_close(average, expected[i])
            assert torch.equal(student[i], before[i])


@pytest.mark.parametrize("size", [1, 16383, 16384, 16385, 200_001])
def test_tensors_of_any_length_lie_in_one_launch(size):
    sizes = [3, size, 0, 1, 40_000]
    teacher = [random_logits([n], n) for n in sizes]
    student = [random_logits([n], n + 1) for n in sizes]
    expected = [averaged(t, s, 0.9) for t, s in zip(teacher, student, strict=True)]
    fastmt.ema_update_(teacher, student, 0.9)
    for average, mean in zip(teacher, expected, strict=True):
        assert_average_close(average, mean)


@pytest.mark.parametrize("student_dtype", DTYPES)
def test_many_steps_follow_the_closed_form(student_dtype):
    generator = torch.Generator().manual_seed(0)
    students = torch.randn(300, 50, generator=generator).to(student_dtype)
    teacher, expected = torch.zeros(50), torch.zeros(50, dtype=torch.float64)
    for step, student in enumerate(students):
        decay = min(1 - 1 / (step + 1), 0.99)
        fastmt.ema_update_([teacher], [student], decay)
        expected = averaged(expected, student, decay)
    torch.testing.assert_close(teacher.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", [float, partial(torch.tensor, dtype=torch.float64)])
def test_a_decay_near_1_is_known_to_more_digits_than_float32_has(number):
    teacher = torch.zeros(3)
    fastmt.ema_update_([teacher], [torch.ones(3)], number(1 - 1e-7))
    torch.testing.assert_close(teacher, torch.full((3,), 1e-7), rtol=1e-6, atol=0)


def test_decay_0_copies_the_student_exactly():
    teacher = [torch.full((9,), 1e8), torch.full((9,), torch.nan), torch.full((9,), torch.inf)]
    student = [random_logits((9,), i) for i in range(3)]
    fastmt.ema_update_(teacher, student, 0.0)
    for average, value in zip(teacher, student, strict=True):
        assert torch.equal(average, value)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision_is_rounded_to_the_nearest_and_between_two_to_the_even(dtype):
    every = torch.arange(2**15, dtype=torch.int16).view(dtype)
    every = every[every < 1e38].float()
    middle = (every[1:] + every[:-1]) / 2
    bits = middle.view(torch.int32)
    for value in (middle, (bits - 1).view(torch.float32), (bits + 1).view(torch.float32)):
        average = torch.zeros(value.shape, dtype=dtype)
        fastmt.ema_update_([average], [value], 0.0)
        assert torch.equal(average, value.to(dtype))


@pytest.mark.parametrize("number", [float, partial(torch.tensor, dtype=torch.float64)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("given", [0.5, torch.nan, torch.inf])
def test_decay_1_leaves_the_teacher_as_it_is(given, dtype, number):
    teacher, student = random_logits((40,), 0).to(dtype), torch.full((40,), given)
    before = teacher.clone()
    fastmt.ema_update_([teacher], [student], number(1.0))
    assert torch.equal(teacher, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, "every bit set"])
def test_a_student_that_is_not_finite_shows_in_the_teacher(poison, dtype):
    teacher, student = torch.zeros(40, dtype=dtype), torch.ones(40, dtype=dtype)
    if poison == "every bit set":  # a NaN that a carry would make 0
        student[7:8].view(torch.int32 if dtype == torch.float32 else torch.int16)[:] = -1
    else:
        student[7] = poison
    fastmt.ema_update_([teacher], [student], 0.9)
    assert teacher.isfinite().logical_not().nonzero().flatten().tolist() == [7]
    assert teacher[7].isnan() == student[7].isnan()


def test_integer_and_bool_tensors_become_copies():
    teacher = [torch.zeros(3), torch.tensor(3), torch.tensor([True, False])]
    student = [torch.ones(3), torch.tensor(10**12), torch.tensor([False, True])]
    fastmt.ema_update_(teacher, student, 0.9)
    assert torch.equal(teacher[1], student[1])
    assert torch.equal(teacher[2], student[2])


def test_complex_tensors_are_averaged():
    teacher, student = torch.zeros(3, dtype=torch.complex64), torch.full((3,), 2 + 4j)
    for value in (student, student.conj()):
        average = teacher.clone()
        fastmt.ema_update_([average], [value], 0.75)
        assert torch.equal(average, value / 4)
        turned = teacher.clone().conj()  # its memory holds the conjugates
        fastmt.ema_update_([turned], [value], 0.75)
        assert torch.equal(turned, value / 4)
    with pytest.raises(
        TypeError, match=r"^student\[0\]: got torch.int64, teacher\[0\] is torch.comp"
    ):
        fastmt.ema_update_([teacher], [torch.ones(3, dtype=torch.int64)], 0.5)


def test_a_tied_parameter_is_averaged_once():
    tied, student = torch.zeros(20), torch.ones(20)
    fastmt.ema_update_([tied, tied, tied.view(4, 5)], [student, student, student.view(4, 5)], 0.5)
    torch.testing.assert_close(tied, torch.full((20,), 0.5))


def test_versions_of_the_teacher_are_bumped_so_that_autograd_notices():
    weight = torch.ones(3)
    x = torch.ones(3, requires_grad=True)
    product = (x * weight).sum()
    fastmt.ema_update_([weight], [torch.zeros(3)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_leaf_that_requires_grad_is_updated_without_a_graph():
    teacher = torch.nn.Parameter(torch.zeros(3))
    fastmt.ema_update_([teacher], [torch.nn.Parameter(torch.ones(3))], 0.5)
    assert teacher.grad_fn is None
    assert torch.equal(teacher.detach(), torch.full((3,), 0.5))


def test_decay_is_read_anew_at_each_call():
    teacher, student, decay = torch.zeros(3), torch.ones(3), torch.tensor(1.0)
    for value, expected in ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0)):
        decay.fill_(value)
        fastmt.ema_update_([teacher], [student], decay)
        assert torch.equal(teacher, torch.full((3,), expected))


def test_tensors_freed_and_made_again_are_never_mistaken():
    teacher = torch.zeros(64)
    for step in range(200):
        student = torch.full((64,), float(step), dtype=DTYPES[step % 3])
        fastmt.ema_update_([teacher], [student], 0.0)
        assert torch.equal(teacher, student.float())
        del student
    for step in range(60):
        fresh = [torch.full((8 + step % 3,), 1.0) for _ in range(3)]
        fastmt.ema_update_(fresh, [torch.full_like(t, 3.0) for t in fresh], 0.5)
        assert all(torch.equal(t, torch.full_like(t, 2.0)) for t in fresh)
        if step % 10 == 0:
            gc.collect()


def test_lists_that_were_averaged_are_freed_with_their_tensors():
    def one_update(dtype):
        teacher = [torch.zeros(9, dtype=dtype) for _ in range(4)]
        student = [torch.nn.Parameter(torch.ones(9)) for _ in range(4)]
        for _ in range(3):
            fastmt.ema_update_(teacher, student, 0.5)
        return [weakref.ref(tensor) for tensor in (*teacher, *student)]

    for dtype in (torch.float32, torch.float64):
        ends = one_update(dtype)
        gc.collect()
        assert all(end() is None for end in ends)


@pytest.mark.parametrize("dropped", ["teacher", "student"])
def test_the_tensors_of_either_list_are_freed_alone(dropped):
    lists = {
        "teacher": [torch.zeros(9) for _ in range(4)],
        "student": [torch.ones(9) for _ in range(4)],
    }
    fastmt.ema_update_(**lists, decay=0.5)
    ends = [weakref.ref(tensor) for tensor in lists.pop(dropped)]
    gc.collect()
    assert all(end() is None for end in ends)


@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("size", [1, 2])  # of more elements PyTorch raises where they are compared
def test_another_tensor_of_the_same_value_is_told_apart(which, place, size):
    lists = {name: [torch.zeros(size) for _ in range(3)] for name in ("teacher", "student")}
    fastmt.ema_update_(**lists, decay=0.5)
    lists[which][place] = lists[which][place].clone()
    fastmt.ema_update_(**lists, decay=0.5)
    lists["student"][place].fill_(8)
    fastmt.ema_update_(**lists, decay=0.5)
    assert [t[-1].item() for t in lists["teacher"]] == [4.0 * (i == place) for i in range(3)]


def test_more_lists_in_turn_than_are_remembered_are_each_averaged():
    teachers = [[torch.zeros(5)] for _ in range(20)]
    students = [[torch.full((5,), float(i))] for i in range(20)]
    for _ in range(2):
        for teacher, student in zip(teachers, students, strict=True):
            fastmt.ema_update_(teacher, student, 0.5)
    for i, (teacher,) in enumerate(teachers):
        assert torch.equal(teacher, torch.full((5,), 0.75 * i))


def test_no_tensors_are_no_work():
    fastmt.ema_update_([], [], 0.5)
    fastmt.ema_update_([torch.zeros(0)], [torch.zeros(0)], 0.5)
