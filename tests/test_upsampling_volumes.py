"""Logits of one and three dimensions are up-sampled before the kernels, as by the reference."""

from __future__ import annotations

import pytest
import torch
from operands import random_logits
from tolerances import assert_gradient_close, assert_loss_close

import fastmt
from fastmt import reference

pytestmark = pytest.mark.usefixtures("kernels")

SIZES = [((9,), (40,)), ((4, 5, 3), (9, 15, 6)), ((6, 7, 8), (3, 7, 2))]


def inputs(low, size, dtype):
    shape = (2, 4, *low)
    student, *teachers = (random_logits(shape, seed, 3.0, dtype) for seed in range(3))
    labels = torch.randint(4, (2, *size), generator=torch.Generator().manual_seed(3))
    labels[0, 0] = 255
    return student.requires_grad_(), teachers, labels


def assert_same(loss, expected, student):
    (gradient,) = torch.autograd.grad(loss, student)
    (truth,) = torch.autograd.grad(expected, student)
    assert gradient.dtype == student.dtype
    assert_loss_close(loss, expected, student.dtype)
    assert_gradient_close(gradient, truth, student.dtype)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("low", "size"), SIZES)
def test_losses_and_gradients_are_those_of_the_reference(low, size, dtype, align_corners):
    student, teachers, labels = inputs(low, size, dtype)
    options = {"size": size, "align_corners": align_corners, "weight": "none", "loss": "kl"}
    loss = fastmt.consistency_loss(student, teachers, **options)
    assert_same(loss, reference.consistency_loss(student, teachers, **options), student)
    loss = fastmt.cross_entropy(student, labels, align_corners=align_corners)
    expected = reference.cross_entropy(student, labels, align_corners=align_corners)
    assert_same(loss, expected, student)


@pytest.mark.parametrize(("low", "size"), SIZES)
def test_confidence_is_that_of_the_reference(low, size):
    _, teachers, _ = inputs(low, size, torch.float32)
    score, label = fastmt.softmax_confidence(teachers, size=size)
    expected = reference.softmax_confidence(teachers, size=size)
    torch.testing.assert_close(score, expected.score)
    assert torch.equal(label, expected.label)


def test_a_teacher_of_the_output_size_goes_with_a_student_that_is_upsampled():
    low, size = SIZES[1]
    student, teachers, _ = inputs(low, size, torch.float32)
    teacher = reference.upsample(teachers[0], size, False)
    options = {"size": size, "threshold": 0.5}
    loss = fastmt.consistency_loss(student, teacher, **options)
    assert_same(loss, reference.consistency_loss(student, teacher, **options), student)
