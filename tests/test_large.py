"""Offsets beyond 2^31 elements, large gradients, and memory that stays at low resolution."""

from __future__ import annotations

import pytest
import torch
from operands import random_logits

import fastmt
from benchmarks import machine
from fastmt import cpp_backend

pytestmark = pytest.mark.skipif(
    cpp_backend.missing() is not None, reason="properties of the C++ kernels"
)
FAR = 2**31 + 64  # elements between two images
SIZES = [None, (13, 24)]


@pytest.fixture(autouse=True)
def kernels():
    with fastmt.backend("cpp", strict=True):
        yield


def far_apart(values: torch.Tensor) -> torch.Tensor:
    """The same images, FAR elements apart; the pages in between are never touched."""
    around = torch.empty(FAR + values[0].numel(), dtype=values.dtype)
    stride = (FAR, *values[0].stride())
    return around.as_strided(values.shape, stride).copy_(values)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("classes", [5, 19])
def test_images_more_than_2_31_elements_apart_give_the_same_results(classes, size):
    student, teacher = (random_logits((2, classes, 6, 7), seed) for seed in (0, 1))
    out = (2, *(size or (6, 7)))
    labels = torch.randint(5, out, generator=torch.Generator().manual_seed(0))

    def results(move):
        z = move(student).requires_grad_()
        maps = {"valid": move(labels != 3), "pixel_weight": move(labels.half())}
        loss = fastmt.consistency_loss(z, move(teacher), threshold=0.5, size=size, **maps)
        supervised = fastmt.cross_entropy(z, move(labels.to(torch.uint8)))
        gradients = [torch.autograd.grad(value, z)[0] for value in (loss, supervised)]
        confidence = fastmt.softmax_confidence(move(teacher), size=size)
        return loss, supervised, *gradients, *confidence

    for near, far in zip(results(torch.clone), results(far_apart), strict=True):
        assert torch.equal(near, far)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_that_outgrows_the_caches_is_that_of_another_layout(dtype):
    images = 4 // dtype.itemsize
    shape = (2 * images, 19, 503, 501)  # lines that no vector starts with
    student, teacher = (random_logits(shape, seed).to(dtype) for seed in (0, 1))
    labels = torch.randint(19, (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(0))
    assert student.nbytes > 32 << 20

    def gradients(z):
        z = z.detach().requires_grad_()
        losses = fastmt.consistency_loss(z, teacher, threshold=0.3), fastmt.cross_entropy(z, labels)
        return [torch.autograd.grad(loss, z)[0] for loss in losses]

    last = gradients(student.to(memory_format=torch.channels_last))
    for near, far in zip(gradients(student), last, strict=True):
        assert not far.is_contiguous() and near.is_contiguous()
        assert torch.equal(near, far)


def test_an_output_of_more_than_2_31_logits_is_the_mean_of_its_images():
    images, side = 460, 512  # 460 x 19 x 512 x 512 logits that never exist
    assert images * 19 * side * side > 2**31
    student, teacher = (random_logits((1, 19, 16, 16), seed) for seed in (0, 1))

    def result(count):
        z = student.repeat(count, 1, 1, 1).requires_grad_()
        loss = fastmt.consistency_loss(
            z, teacher.expand(count, -1, -1, -1), threshold=0.4, size=(side, side)
        )
        return loss.detach(), torch.autograd.grad(loss, z)[0] * count

    loss, gradient = result(1)
    many, gradients = result(images)
    assert loss > 0
    torch.testing.assert_close(many, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[0], gradient[0], rtol=1e-5, atol=1e-9)
    assert (gradients[1:] == gradients[:1]).all()


def test_upsampling_takes_no_memory_of_the_outputs_size():
    student, teacher = (random_logits((2, 19, 64, 64), seed) for seed in (0, 1))
    student.requires_grad_()
    volume = random_logits((1, 2, 16, 32, 32), 2).requires_grad_()
    labels = torch.zeros(2, 1024, 1024, dtype=torch.uint8)
    by_pixel = torch.rand(2, 1024, 1024).mT
    calls = {
        "consistency": lambda: fastmt.consistency_loss(
            student, teacher, threshold=0.5, size=(1024, 1024), pixel_weight=by_pixel
        ),
        "cross_entropy": lambda: fastmt.cross_entropy(student, labels, pixel_weight=by_pixel),
        "volumes": lambda: fastmt.consistency_loss(
            volume, volume.detach(), threshold=0.5, size=(64, 256, 256)
        ),
    }
    for name, call in calls.items():
        call().backward()
        student.grad = None
        peak = machine.peak_extra_bytes(lambda call=call: call().backward(), torch.device("cpu"))
        if peak is None:
            pytest.skip("the system keeps no record of the largest resident size")
        assert peak < by_pixel.nbytes, name
