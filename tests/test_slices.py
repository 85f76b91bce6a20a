"""Volumes whose depth is interpolated before the kernels up-sample their planes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operands import random_logits
from tolerances import assert_gradient_close

import fastmt
from fastmt import slices

pytestmark = pytest.mark.usefixtures("kernels")

DEPTHS = [(1, 1), (1, 5), (4, 1), (5, 2), (2, 5), (3, 9), (7, 8), (4, 11), (9, 3)]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("depth", "out"), DEPTHS)
def test_slices_and_their_gradient_are_those_of_interpolate(depth, out, align_corners):
    x = random_logits((2, depth, 3, 2, 5), 0).requires_grad_()
    planes = x.double().flatten(2).unsqueeze(1)
    size, mode = (out, planes.shape[-1]), "bilinear"
    expected = F.interpolate(planes, size=size, mode=mode, align_corners=align_corners)
    expected = expected.reshape(2, out, 3, 2, 5)
    weight = random_logits(expected.shape, 1)
    (truth,) = torch.autograd.grad(expected, x, weight.double())
    for operations in (torch.ops.fastmt, slices):
        resampled = operations.resample_slices(x.detach(), out, align_corners)
        gradient = operations.resample_slices_backward(weight, depth, align_corners)
        assert_gradient_close(resampled, expected.detach(), torch.float32)
        assert_gradient_close(gradient, truth, torch.float32)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("depth", "out"), DEPTHS)
def test_a_slice_reaches_those_that_are_made_of_it_alone(depth, out, align_corners):
    x = random_logits((1, depth, 1, 1, 3), 0)
    taken = torch.zeros(out, depth)
    for k in range(depth):
        alone = torch.zeros_like(x)
        alone[:, k] = 1
        taken[:, k] = slices.resample_slices(alone, out, align_corners)[0, :, 0, 0, 0]
    for operations in (torch.ops.fastmt, slices):
        for k in range(depth):
            holed = x.clone()
            holed[:, k] = torch.inf
            reached = ~operations.resample_slices(holed, out, align_corners).isfinite()
            assert torch.equal(reached[0, :, 0, 0, 0], taken[:, k] > 0)
        for z in range(out):
            holed = torch.zeros(1, out, 1, 1, 3)
            holed[:, z] = torch.nan
            reached = operations.resample_slices_backward(holed, depth, align_corners).isnan()
            assert torch.equal(reached[0, :, 0, 0, 0], taken[z] > 0)


@pytest.mark.parametrize("operation", ["resample_slices", "resample_slices_backward"])
def test_the_library_checks_what_resamples(operation):
    fastmt.softmax_confidence(torch.zeros(1, 2, 3))  # loads it
    call = (random_logits((2, 3, 4, 2, 5), 0), 5, False)
    torch.library.opcheck(getattr(torch.ops.fastmt, operation).default, call)


def loss_and_gradient(student, teacher):
    loss = fastmt.consistency_loss(student, teacher, threshold=0.5, size=(9, 12, 10))
    return loss, *torch.autograd.grad(loss, student)


def test_any_number_of_threads_gives_the_same_bits():
    student, teacher = (random_logits((3, 4, 5, 6, 5), seed) for seed in (0, 1))
    student.requires_grad_()
    alone = loss_and_gradient(student, teacher)
    torch.set_num_threads(3)  # the fixture puts it back
    for one, several in zip(alone, loss_and_gradient(student, teacher), strict=True):
        assert torch.equal(one, several)


def test_a_compiled_loss_of_volumes_is_one_graph_with_the_same_gradient():
    student, teacher = (random_logits((2, 4, 3, 4, 5), seed) for seed in (0, 1))
    student.requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(student, teacher):
        return fastmt.consistency_loss(student, teacher, threshold=0.5, size=(9, 12, 10))

    loss, gradient = loss_and_gradient(student, teacher)
    traced = compiled(student, teacher)
    assert torch.equal(traced, loss)
    torch.testing.assert_close(torch.autograd.grad(traced, student)[0], gradient)
