"""What the moving average refuses, by the name of what does not fit, with nothing averaged."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from test_ema import implementation as implementation

import fastmt


def test_shared_storage_is_refused():
    flat = torch.zeros(10)
    with pytest.raises(ValueError, match=r"^student\[1\]: shares storage with the teacher"):
        fastmt.ema_update_([torch.ones(3), flat[:5]], [torch.ones(3), flat[5:]], 0.5)
    assert not flat.any()


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_decay_outside_0_to_1_is_refused(decay):
    teacher = torch.zeros(1)
    for number in (decay, torch.tensor(decay), torch.tensor(decay, dtype=torch.float64)):
        with pytest.raises(ValueError, match=f"^decay: got {str(decay)[:4]}"):
            fastmt.ema_update_([teacher], [torch.ones(1)], number)
        assert teacher == 0


def test_a_decay_for_each_tensor_is_refused():
    with pytest.raises(ValueError, match=r"^decay: got shape \(3\)"):
        fastmt.ema_update_([torch.zeros(3)], [torch.ones(3)], torch.tensor([0.1, 0.2, 0.3]))


@pytest.mark.parametrize("decay", [torch.tensor(True), torch.tensor(0.5 + 0j)])
def test_a_decay_that_is_no_real_number_is_refused(decay):
    teacher = torch.zeros(1)
    with pytest.raises(TypeError, match=f"^decay: got {decay.dtype}, expected real numbers"):
        fastmt.ema_update_([teacher], [torch.ones(1)], decay)
    assert teacher == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decay_may_be_a_fraction(dtype):
    teacher = torch.zeros(1, dtype=dtype)
    fastmt.ema_update_([teacher], [torch.ones(1, dtype=dtype)], Fraction(1, 4))
    assert teacher == 0.75


def test_lists_that_do_not_fit_are_refused_by_name():
    zeros = torch.zeros(3)
    with pytest.raises(ValueError, match="^student: got 1 tensors, expected 2"):
        fastmt.ema_update_([zeros, torch.zeros(2)], [torch.ones(3)], 0.5)
    with pytest.raises(ValueError, match=r"^student\[0\]: got shape \(1, 3\), expected \(3\)"):
        fastmt.ema_update_([zeros], [torch.ones(1, 3)], 0.5)
    with pytest.raises(TypeError, match=r"^student\[0\]: got torch.int64, teacher\[0\] is "):
        fastmt.ema_update_([zeros], [torch.ones(3, dtype=torch.int64)], 0.5)
    assert not zeros.any()


@pytest.mark.parametrize("place", [0, 1])
def test_tensors_of_two_sizes_in_one_memory_are_refused(place):
    flat = torch.zeros(8)
    teacher = [flat, flat[:5]] if place else [flat[:5], flat]
    with pytest.raises(ValueError, match=r"^teacher\[1\]: shares memory with teacher\[0\], which"):
        fastmt.ema_update_(teacher, [torch.ones_like(t) for t in teacher], 0.5)
    assert not flat.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_what_cannot_be_averaged_in_a_list_is_named_and_nothing_is_averaged(dtype, name):
    first, freed = torch.zeros(3), torch.ones(3, dtype=dtype)
    freed.untyped_storage().resize_(0)
    bad = {None: "got NoneType, expected a tensor", freed: "its storage was freed"}
    if name == "teacher":
        bad[torch.ones(1, dtype=dtype).expand(3)] = "several elements are one place in memory"
    for entry, message in bad.items():
        good = torch.ones(3, dtype=dtype)
        entries = {"teacher": [first, good], "student": [torch.ones(3), good]}
        entries[name][1] = entry
        with pytest.raises((TypeError, ValueError), match=rf"^{name}\[1\]: {message}"):
            fastmt.ema_update_(**entries, decay=0.5)
    assert not first.any()


def test_what_is_no_tensor_is_named_before_the_first_tensor_that_is_averaged():
    teacher, student = (
        [torch.zeros(3).int(), entry, torch.ones(3)] for entry in (None, torch.ones(3))
    )
    with pytest.raises(TypeError, match=r"^teacher\[1\]: got NoneType, expected a tensor"):
        fastmt.ema_update_(teacher, student, 0.5)


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_tensors_without_memory_of_their_own_are_refused_by_name(kind):
    zeros, other = torch.zeros(3), torch.ones(3)
    other = other.to("meta") if kind == "meta" else other.to_sparse()
    for name, lists in (("teacher", ([other], [zeros])), ("student", ([zeros], [other]))):
        with pytest.raises(TypeError, match=rf"^{name}\[0\]: is .*{kind}.*, expected a dense"):
            fastmt.ema_update_(*lists, 0.5)
