"""The slices of volumes that the Triton kernels interpolate along their depth."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import small
import torch
from operands import DTYPES, LAYOUTS, laid_out, random_logits
from test_slices import (  # noqa: F401, the cases of the C++ kernels
    assert_interpolates,
    test_a_slice_reaches_those_that_are_made_of_it_and_no_other,
    test_slices_and_their_gradient_are_those_of_interpolate,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fastmt
from fastmt import kernels, triton_backend
from fastmt.kernels import launch as launching
from fastmt.kernels import slices, views

pytestmark = pytest.mark.usefixtures("kernels")

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="here tensors are moved to a GPU first"
)
# Views, and outputs, which are filled because they are poisoned.
FREE = ("empty", "new_empty", "view", "permute", "detach", "fill")


@pytest.fixture
def operations():
    return kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_any_layout_and_dtype_are_read_as_they_lie(layout, dtype):
    logits = laid_out(random_logits((2, 3, 4, 5, 7), 0, dtype=dtype), layout)
    for out in (3, 9):
        assert_interpolates(kernels, logits.movedim(2, 1), out, False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_of_any_layout_is_read_as_it_lies(layout):
    gradient = laid_out(random_logits((2, 3, 9, 5, 7), 0), layout).movedim(2, 1)
    result = kernels.resample_slices_backward(gradient, 4, True)
    assert torch.equal(result, kernels.resample_slices_backward(gradient.contiguous(), 4, True))


def test_a_view_that_negates_its_memory_is_read_with_its_sign():
    x = random_logits((2, 4, 3, 2, 5), 0)
    for function in (kernels.resample_slices, kernels.resample_slices_backward):
        assert torch.equal(function(torch._neg_view(-x), 9, False), function(x, 9, False))


def test_a_slice_of_several_blocks_is_interpolated_to_its_last_pixel():
    assert slices.BLOCK == 1024
    for plane in ((32, 32), (3, 683), (1, 1025)):
        assert_interpolates(kernels, random_logits((1, 3, 1, *plane), 0), 5, False)


def test_64_bit_offsets_and_repeated_calls_give_the_same_bits(monkeypatch):
    x = laid_out(random_logits((2, 3, 4, 5, 7), 0), "transposed").movedim(2, 1)
    gradient = random_logits((2, 9, 3, 5, 7), 1)

    def results():
        yield kernels.resample_slices(x, 9, False)
        yield kernels.resample_slices_backward(gradient, 4, False)

    first, again = list(results()), list(results())
    monkeypatch.setattr(views, "NARROW", 0)
    in_64_bits = small.offsets_of(monkeypatch, slices)
    for a, b, c in zip(first, again, results(), strict=True):
        assert not a.isnan().any()
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert in_64_bits == [True, True]


@pytest.mark.parametrize("dim", range(5))
def test_offsets_beyond_2_to_the_31_elements_are_found(dim):
    torch.utils.deterministic.fill_uninitialized_memory = False  # the fixture puts it back
    values = random_logits((3, 3, 3, 3, 3), 0, dtype=torch.bfloat16)
    strides = list(values.stride())
    strides[dim] = 3 * 2**29  # of which each fits into 32 bits
    memory = torch.empty(2 * strides[dim] + values.numel(), dtype=values.dtype)
    far = memory.as_strided(values.shape, strides).copy_(values)
    for function in (kernels.resample_slices, kernels.resample_slices_backward):
        assert torch.equal(function(far, 5, False), function(values, 5, False))


@pytest.mark.parametrize("align_corners", [False, True])
def test_nothing_is_interpolated_of_an_empty_volume(align_corners):
    for shape in ((0, 4, 3, 5, 7), (2, 4, 3, 0, 7)):
        x = torch.zeros(shape)
        for function in (kernels.resample_slices, kernels.resample_slices_backward):
            assert function(x, 9, align_corners).shape == (shape[0], 9, *shape[2:])


@interpreted
@pytest.mark.parametrize("operation", ["resample_slices", "resample_slices_backward"])
def test_the_library_checks_what_resamples(operation):
    slices = random_logits((2, 4, 3, 2, 5), 0, dtype=torch.bfloat16).movedim(2, 1)
    torch.library.opcheck(getattr(triton_backend.nodes(), operation).default, (slices, 5, False))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_depth_is_one_launch_and_its_gradient_another_and_nothing_else_runs(monkeypatch, dtype):
    ran, launches = Counter(), Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            ran[function.overloadpacket.__name__] += 1
            return function(*arguments, **(options or {}))

    def noted(kernel, *_, **options):
        launches[kernel.fn.__name__] += 1

    monkeypatch.setattr(launching, "launch", noted)
    student = laid_out(random_logits((2, 3, 4, 2, 3), 0, dtype=dtype), "channels_last")
    student.requires_grad_()
    with Counting():
        loss = fastmt.consistency_loss(student, student.detach(), size=(9, 4, 6))
        torch.autograd.grad(loss, student)
    assert launches["slices_fwd_kernel"] == 2  # student and teacher
    assert launches["slices_bwd_kernel"] == 1
    left = {name: count for name, count in ran.items() if not name.startswith(FREE)}
    assert left == {"ones_like": 1, **({"_to_copy": 1} if dtype != torch.float32 else {})}
