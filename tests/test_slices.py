"""Volumes whose depth is interpolated before the kernels up-sample their planes."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from operands import random_logits
from tolerances import assert_gradient_close

import fastmt
from fastmt import planes, slices, triton_backend

pytestmark = pytest.mark.usefixtures("kernels")

DEPTHS = [(1, 1), (1, 5), (4, 1), (5, 2), (2, 5), (3, 9), (7, 8), (4, 11), (9, 3)]


class OfTorch:
    """What stands in for kernels, by their names and signatures."""

    resample_slices = staticmethod(slices.resample_slices)

    @staticmethod
    def resample_slices_backward(gradient, depth, align_corners):
        shape = (gradient.shape[0], depth, *gradient.shape[2:])
        x = torch.zeros(shape, requires_grad=True)
        resampled = slices.resample_slices(x, gradient.shape[1], align_corners)
        return torch.autograd.grad(resampled, x, gradient)[0]


@pytest.fixture(params=["cpp", "torch"])
def operations(request):
    return torch.ops.fastmt if request.param == "cpp" else OfTorch


def interpolated(volumes, out, align_corners):
    """Slices (N, D, ...) as F.interpolate has them, in float64."""
    rows = volumes.double().flatten(2).unsqueeze(1)
    size = (out, rows.shape[-1])
    rows = F.interpolate(rows, size=size, mode="bilinear", align_corners=align_corners)
    return rows.reshape(volumes.shape[0], out, *volumes.shape[2:])


def assert_interpolates(operations, x, out, align_corners):
    """Slices and their gradient are those of interpolate, in contiguous float32."""
    x = x.detach().requires_grad_()
    expected = interpolated(x, out, align_corners)
    weight = random_logits(expected.shape, 1)
    (truth,) = torch.autograd.grad(expected, x, weight.double())
    resampled = operations.resample_slices(x.detach(), out, align_corners)
    gradient = operations.resample_slices_backward(weight, x.shape[1], align_corners)
    for result, right in ((resampled, expected.detach()), (gradient, truth)):
        assert result.dtype == torch.float32
        assert result.is_contiguous()
        assert_gradient_close(result, right, x.dtype if right is truth else torch.float32)


def taken_slices(depth, out, align_corners):
    """(out, depth): whether an output slice takes anything of an input slice."""
    rows = []
    for z in range(out):
        place = Fraction((2 * z + 1) * depth - out, 2 * out)
        if align_corners:
            place = Fraction(z * (depth - 1), max(out - 1, 1))
        place = min(max(place, 0), depth - 1)
        rows.append([abs(place - k) < 1 for k in range(depth)])
    return torch.tensor(rows)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("depth", "out"), DEPTHS)
def test_slices_and_their_gradient_are_those_of_interpolate(operations, depth, out, align_corners):
    assert_interpolates(operations, random_logits((2, depth, 3, 2, 5), 0), out, align_corners)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("depth", "out"), DEPTHS)
def test_a_slice_reaches_those_that_are_made_of_it_and_no_other(
    operations, depth, out, align_corners
):
    taken = taken_slices(depth, out, align_corners)
    for k in range(depth):
        holed = random_logits((1, depth, 1, 1, 3), 0)
        holed[:, k] = torch.inf
        reached = ~operations.resample_slices(holed, out, align_corners).isfinite()
        assert torch.equal(reached[0, :, 0, 0, 0], taken[:, k])
    for z in range(out):
        holed = torch.zeros(1, out, 1, 1, 3)
        holed[:, z] = torch.nan
        reached = operations.resample_slices_backward(holed, depth, align_corners).isnan()
        assert torch.equal(reached[0, :, 0, 0, 0], taken[z])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_without_triton_has_depths_interpolated_by_pytorch(monkeypatch, dtype):
    class OfAGpu(torch.Tensor):
        is_cpu = False

    x = random_logits((2, 3, 4, 2, 5), 0, dtype=dtype).requires_grad_()
    monkeypatch.setattr(triton_backend, "missing", lambda: "Triton is not installed")
    (logits,) = planes.logits_of_planes([x.as_subclass(OfAGpu)], (7, 4, 10), False, "cpp")
    logits = logits.as_subclass(torch.Tensor)
    expected = interpolated(x.movedim(2, 1), 7, False).flatten(0, 1)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected.float())
    loss = fastmt.consistency_loss(logits, expected.detach().float() + 1, size=(4, 10), loss="kl")
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    assert gradient.dtype == dtype
    with pytest.raises(RuntimeError, match="second derivative of a loss is not in the kernels"):
        torch.autograd.grad(gradient.square().sum(), x)


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
