"""What is not finite, excluded or certain, dense and up-sampled inside the Triton kernels."""

from __future__ import annotations

from functools import partial
from numbers import Number

import numpy as np
import pytest
import torch
from operands import random_logits
from test_upsampling_borders import (  # noqa: F401
    test_a_border_knows_nothing_of_large_logits_that_do_not_reach_it,
    test_a_large_pixel_weight_leaves_a_wide_range_of_logits_finite,
    test_a_logit_leaves_no_trace_where_it_has_no_weight,
    test_a_logit_that_is_not_finite_poisons_the_pixels_it_reaches_and_no_other,
    test_a_nan_in_either_network_makes_loss_and_gradient_of_its_pixel_nan,
    test_a_student_and_a_teacher_of_nearly_the_same_logits_stay_certain_while_walked,
    test_one_class_alone_teaches_exactly_nothing,
    test_the_gradients_of_one_cell_add_up_within_the_range_of_float16,
    test_the_label_of_a_pixel_that_is_nan_is_that_of_the_reference,
)

import fastmt
from fastmt import kernels
from fastmt.confidence import KINDS
from fastmt.consistency import LOSSES

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("classes", "members"), [(1, 3), (2, 1), (5, 11), (19, 14)])
@pytest.mark.parametrize("size", [None, (4, 7)])
def test_a_certain_teacher_scores_exactly_one(kind, classes, members, size):
    teacher = torch.full((1, classes, 2, 3), -200.0)
    teacher[:, 0] = 7.25
    score, label = fastmt.softmax_confidence([teacher] * members, kind=kind, size=size)
    assert (score == 1).all()
    assert not label.any()


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64])
def test_numbers_of_numpy_reach_the_kernels_as_those_of_python(number, monkeypatch):
    numbers = []  # the interpreter takes any, Triton that compiles does not

    def seen(kernel, *call):
        flat = [part for given in call for part in (given if isinstance(given, list) else [given])]
        numbers.extend(type(part) for part in flat if isinstance(part, Number))
        return kernel(*call)

    for name in ("softmax_confidence", "consistency_loss", "cross_entropy"):
        monkeypatch.setattr(kernels, name, partial(seen, getattr(kernels, name)))
    logits, labels = random_logits((1, 4, 2, 3), 0), torch.zeros(1, 2, 3, dtype=torch.int64)
    fastmt.softmax_confidence(logits, temperature=number(2))
    fastmt.consistency_loss(logits, logits, temperature=number(2))
    fastmt.cross_entropy(logits, labels, label_smoothing=number(1), ignore_index=np.int64(3))
    assert {int, float} <= set(numbers) <= {bool, int, float}


@pytest.mark.parametrize("size", [None, (4, 6)])
def test_a_view_that_negates_its_memory_is_read_with_its_sign(size):
    def negated(tensor):  # as is the imaginary part of a conjugate
        return torch._neg_view(-tensor)

    logits, teacher = random_logits((1, 4, 2, 3), 0), random_logits((1, 4, 2, 3), 1)
    out = (1, *(size or (2, 3)))
    weight, labels = torch.rand(out), torch.zeros(out, dtype=torch.int64)
    classes = torch.rand(4)

    def results(sign):
        maps = {"pixel_weight": sign(weight)}
        options = {"size": size, "threshold": sign(torch.tensor(0.4)), **maps}
        yield from fastmt.softmax_confidence([sign(teacher)] * 2, size=size)
        yield fastmt.consistency_loss(sign(logits), sign(teacher), **options)
        yield fastmt.cross_entropy(sign(logits), labels, class_weight=sign(classes), **maps)

    for given, expected in zip(results(negated), results(torch.clone), strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("loss", ["mse", "ce", "kl"])
def test_a_class_that_is_excluded_everywhere_has_probability_zero(loss):
    student, teacher = (random_logits((1, 4, 2, 3), seed) for seed in (0, 1))
    options = {"loss": loss, "size": (4, 6), "weight": "none", "confidence": "entropy"}
    expected = fastmt.consistency_loss(student[:, :3], teacher[:, :3], **options)
    student[:, 3] = teacher[:, 3] = -torch.inf
    value = fastmt.consistency_loss(student, teacher, **options)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_nan_makes_loss_and_gradient_of_its_pixel_nan(loss, at, which):
    operands = {
        name: random_logits((1, 5, 2, 2), i) for i, name in enumerate(("teacher", "student"))
    }
    operands[which][0, at, 0, 0] = torch.nan
    student = operands["student"].requires_grad_()
    value = fastmt.consistency_loss(student, operands["teacher"], loss=loss, weight="none")
    (gradient,) = torch.autograd.grad(value, student)
    if loss == "ce" and which == "teacher":  # which gives no more than a label
        assert value.isfinite()
    else:
        assert value.isnan()
        assert gradient[0, :, 0, 0].isnan().all()
    assert gradient[0, :, 1, 1].isfinite().all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_bce_of_one_class_is_nan_only_where_a_logit_is_not_finite(which, poison):
    logits = {name: torch.zeros(1, 1, 1, 2) for name in ("student", "teacher")}
    logits[which][..., 1] = poison
    logits["student"].requires_grad_()
    value = fastmt.consistency_loss(**logits, loss="bce", weight="none")
    (gradient,) = torch.autograd.grad(value, logits["student"])
    assert value.isnan()
    assert gradient.isnan().tolist() == [[[[False, True]]]]
    assert gradient[..., 0] == 0


@pytest.mark.parametrize("size", [(2, 3), (4, 6)])
def test_an_infinite_weight_of_a_class_without_labels_is_harmless(size):
    logits, labels = random_logits((1, 3, 2, 3), 0), torch.ones(1, *size, dtype=torch.uint8)
    labels[0, 0, 0] = 255  # which kernels read as class 0
    values, gradients = [], []
    for weight in (torch.inf, 1.0):
        z, weights = logits.clone().requires_grad_(), torch.tensor([weight, 2.0, weight])
        value = fastmt.cross_entropy(z, labels, class_weight=weights, normalize="weight")
        values.append(value)
        gradients += torch.autograd.grad(value, z)
    assert torch.equal(*values)
    assert torch.equal(*gradients)
