"""Lists of tensors that are averaged by a table, as on a GPU, from one call to the next."""

from __future__ import annotations

import gc
import re
import weakref
from types import SimpleNamespace

import pytest
import torch

import fastmt
from fastmt import cpp_backend, ema_layout, ema_lists, ema_table, native, reference
from fastmt.ema_layout import Layout, unmoved

pytestmark = [
    pytest.mark.skipif(cpp_backend.missing() is not None, reason="the C++ kernels are not built"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True, params=["by C++", "by Python"])
def by_table(request, monkeypatch):
    """Tensors of the CPU are averaged as those of a GPU, with and without the C++ library."""
    monkeypatch.setattr(ema_table, "is_read_by", lambda *_: True)
    if request.param == "by Python":
        monkeypatch.setattr(native, "list_holds", lambda: None)
        absent = SimpleNamespace(missing=lambda: "not built")
        monkeypatch.setattr(ema_layout, "cpp_backend", absent)
    yield
    ema_lists._tables.clear()


@pytest.fixture
def pairs():
    return [torch.zeros(n) for n in (3, 1, 5, 4)], [torch.ones(n) for n in (3, 1, 5, 4)]


@pytest.fixture
def known(pairs):
    """The pairs after as many updates as let them be held."""
    for _ in range(3):
        fastmt.ema_update_(*pairs, 1.0)
    return pairs


@pytest.fixture
def looks(monkeypatch):
    """How many tensors Python looked at."""
    seen = []
    is_that_of = Layout.is_that_of
    monkeypatch.setattr(
        Layout, "is_that_of", lambda layout, given: seen.extend(given) or is_that_of(layout, given)
    )
    return seen


def assert_averaged(teacher, student):
    before = [average.clone() for average in teacher]
    fastmt.ema_update_(teacher, student, 0.5)
    for average, old, value in zip(teacher, before, student, strict=True):
        torch.testing.assert_close(average, 0.5 * old + 0.5 * value)


def test_objects_that_come_again_are_looked_at_by_cpp(known, looks, request):
    teacher, student = known
    fastmt.ema_update_(teacher, student, 0.5)
    if "C++" in request.node.name:
        assert [id(tensor) for tensor in looks] == [id(teacher[0]), id(student[0])]
    assert all((average == 0.5).all() for average in teacher)


def test_tensors_made_anew_of_the_same_memory_are_not_held(pairs):
    teacher, student = pairs
    for _ in range(4):
        fastmt.ema_update_([t.data for t in teacher], [s.data for s in student], 0.5)
    (lists,) = ema_lists._tables.values()
    assert lists._objects is None
    assert all((average == 1 - 0.5**4).all() for average in teacher)


@pytest.mark.parametrize("first", [0, 1])
def test_objects_that_live_beside_others_of_the_same_memory_are_told_apart(
    pairs, first, monkeypatch
):
    """By what they are: the values of tensors, of one element too, are on the device."""
    lists = [tensors[first:] for tensors in pairs]
    anew = [[tensor.data for tensor in tensors] for tensors in lists]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__eq__", lambda *_: pytest.fail("values were compared"))
        for teacher, student in (lists, anew, lists, anew):
            fastmt.ema_update_(teacher, student, 0.5)
    (table,) = ema_lists._tables.values()
    assert table._objects is None
    assert all((average == 1 - 0.5**4).all() for average in lists[0])


def test_a_view_that_negates_is_another_tensor():
    teacher, student = [torch.zeros(4)], torch.full((4,), 3.0)
    for sign in (1, 1, -1, -1, 1):
        given = torch._neg_view(student) if sign < 0 else student.view(4)
        fastmt.ema_update_(teacher, [given], 0.0)
        assert (teacher[0] == sign * 3.0).all()


@pytest.mark.parametrize("whose", [0, 1])
@pytest.mark.parametrize("position", range(4))
def test_memory_that_is_exchanged_is_noticed(known, whose, position):
    tensor = known[whose][position]
    tensor.data = torch.full_like(tensor, 7.0)
    assert_averaged(*known)
    assert_averaged(*known)


@pytest.mark.parametrize("position", range(4))
def test_another_object_in_a_list_is_noticed_without_looking_at_its_values(
    known, position, monkeypatch
):
    teacher, student = known
    before = student[position]  # which lives on, or the lists would be let go
    student[position] = torch.full_like(before, 7.0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__eq__", lambda *_: pytest.fail("values were compared"))
        assert not next(iter(ema_lists._tables.values()))._objects.are(teacher, student)
    assert_averaged(teacher, student)


def test_a_dtype_that_is_exchanged_is_noticed(known):
    student = known[1][2]
    student.data = torch.full((5,), 2.0, dtype=torch.bfloat16)
    fastmt.ema_update_(*known, 0.5)
    assert (known[0][2] == 1).all()


def test_lists_of_another_length_are_others(known):
    teacher, student = known
    assert_averaged(teacher[:3], student[:3])
    with pytest.raises(ValueError, match="^student: got 3 tensors, expected 4"):
        fastmt.ema_update_(teacher, student[:3], 0.5)


@pytest.mark.parametrize(
    ("left", "named"),
    [
        (0, r"student\[2\]: its storage was freed"),
        (4, "student: its storage holds 4 bytes, expected 20"),
    ],
)
def test_a_tensor_that_lost_its_memory_is_named(known, left, named):
    known[1][2].untyped_storage().resize_(left)
    with pytest.raises(ValueError, match=f"^{named}"):
        fastmt.ema_update_(*known, 0.5)


def test_what_was_empty_or_tied_is_averaged_once_it_is_not(pairs):
    teacher, student = pairs
    teacher[2].data = teacher[3].data
    student[2].data = student[3].data
    teacher.append(torch.zeros(0))
    student.append(torch.ones(0))
    for _ in range(3):
        assert_averaged(teacher, student)
    for place in (3, -1):
        teacher[place].data, student[place].data = torch.zeros(2), torch.ones(2)
        assert_averaged(teacher, student)


@pytest.mark.parametrize("change", ["got shape (3), expected (2)", "shares storage"])
def test_what_the_table_leaves_out_is_averaged_while_it_fits(pairs, change):
    teacher, student = pairs
    teacher.append(torch.zeros(2, dtype=torch.float64))
    student.append(torch.ones(2, dtype=torch.float64))
    for _ in range(3):
        assert_averaged(teacher, student)
    shared = change == "shares storage"
    student[-1].data = teacher[-1].data if shared else torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"^student\[4\]: {re.escape(change)}"):
        fastmt.ema_update_(teacher, student, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decay_on_the_host_is_not_copied_to_the_device_which_would_be_waited_for(
    pairs, dtype, monkeypatch
):
    teacher, student = pairs
    teacher.append(torch.zeros(2, dtype=torch.float64))
    student.append(torch.ones(2, dtype=torch.float64))
    given = []
    for module, name in ((ema_table, "decay_on"), (reference, "ema_update_")):
        call = getattr(module, name)
        note = lambda *args, call=call: given.append(args[-1]) or call(*args)  # noqa: E731
        monkeypatch.setattr(module, name, note)
    fastmt.ema_update_(teacher, student, torch.tensor(0.75, dtype=dtype))
    with fastmt.backend("eager"):
        fastmt.ema_update_(teacher, student, torch.tensor(0.75, dtype=dtype))
    assert list(map(type, given)) == [float] * 3
    assert (teacher[-1] == 0.4375).all()
    monkeypatch.setattr(ema_table, "is_capturing", lambda: True)
    fastmt.ema_update_(teacher, student, torch.tensor(0.75, dtype=dtype))
    assert {type(decay) for decay in given[3:]} == {torch.Tensor}


@pytest.mark.parametrize("whose", [0, 1])
def test_lists_are_let_go_with_the_first_of_either(pairs, whose):
    teacher, student = pairs
    for _ in range(3):
        fastmt.ema_update_(teacher, student, 0.5)
    ends = [weakref.ref(tensor) for tensor in (*teacher, *student)]
    kept = (teacher, student)[1 - whose][0]
    del teacher, student
    for tensors in pairs:
        tensors.clear()
    gc.collect()
    assert [end() for end in ends if end() is not None] == [kept]


def test_lists_that_gave_way_to_others_are_let_go():
    firsts, ends = [], []
    for _ in range(2 * ema_lists._MAX_TABLES):
        teacher, student = ([torch.zeros(3), torch.zeros(2)] for _ in range(2))
        for _ in range(3):
            fastmt.ema_update_(teacher, student, 0.5)
        ends.append(weakref.ref(teacher[1]))
        firsts.append((teacher[0], student[0]))
    assert [end() is None for end in ends] == [True] * 8 + [False] * 8


def test_lists_that_another_thread_forgets_meanwhile_are_averaged(pairs, monkeypatch):
    is_of = ema_lists.Lists.is_of

    def is_of_meanwhile(*given):
        ema_lists._tables.clear()
        return is_of(*given)

    monkeypatch.setattr(ema_lists.Lists, "is_of", is_of_meanwhile)
    for _ in range(3):
        assert_averaged(*pairs)


def test_unmoved_says_no_for_good():
    tensor, other = torch.zeros(3), torch.zeros(3)
    holds = unmoved([tensor])
    assert holds()
    first = tensor.data
    tensor.data = other
    assert not holds()
    if hasattr(holds, "__self__"):  # by C++
        tensor.data = first
        assert not holds()
