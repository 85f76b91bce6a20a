"""What both losses make of logits and weights that are not finite, and of excluded classes."""

from __future__ import annotations

import pytest
import torch
from operands import random_logits
from test_semantics import SHAPE, assert_nothing_is_taught, gradient_of, student_logits

import fastmt
from fastmt.consistency import LOSSES, NORMALIZATIONS

pytestmark = pytest.mark.usefixtures("either")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("channel", [0, 3])
def test_a_nan_or_infinite_student_propagates_to_the_loss_and_to_its_own_pixel(
    loss, poison, channel
):
    student = student_logits()
    with torch.no_grad():
        student[1, channel, 2, 3] = poison
    value = fastmt.consistency_loss(student, random_logits(SHAPE, 2), loss=loss, weight="none")
    gradient = gradient_of(value, student)
    assert value.isnan()
    assert gradient[1, :, 2, 3].isnan().any()
    gradient[1, :, 2, 3] = 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [1, 5])
def test_a_nan_pixel_weight_propagates_to_the_loss_and_to_its_own_pixel(loss, classes):
    student, teacher = (random_logits((2, classes, 9, 11), seed) for seed in (1, 2))
    weight = torch.ones(2, 9, 11)
    weight[1, 2, 3] = torch.nan
    student.requires_grad_()
    options = {"weight": "none", "pixel_weight": weight}
    value = fastmt.consistency_loss(student, teacher, loss=loss, **options)
    gradient = gradient_of(value, student)
    assert value.isnan()
    assert gradient[1, :, 2, 3].isnan().all()
    gradient[1, :, 2, 3] = 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("size", [(9, 11), (18, 22)])
def test_where_the_sum_of_weights_is_not_finite_loss_and_gradient_are_nan(poison, size):
    logits = student_logits()
    pixel_weight = torch.ones(2, *size)
    pixel_weight[1, 4, 6] = poison
    options = {"normalize": "weight", "pixel_weight": pixel_weight}
    labels = torch.zeros(2, *size, dtype=torch.uint8)
    values = [fastmt.cross_entropy(logits, labels, **options)]
    for weight in ("none", "ratio"):
        call = {"weight": weight, "threshold": 0.0, "size": size, **options}
        values.append(fastmt.consistency_loss(logits, random_logits(SHAPE, 2), **call))
    for value in values:
        assert value.isnan()
        assert gradient_of(value, logits)[1].isnan().any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_ratio_of_0_teaches_nothing_whatever_the_weights_of_pixels(poison, normalize):
    student, pixel_weight = student_logits(), torch.full((2, 9, 11), poison)
    options = {"weight": "ratio", "threshold": 2.0, "normalize": normalize}
    value = fastmt.consistency_loss(
        student, random_logits(SHAPE, 2), pixel_weight=pixel_weight, **options
    )
    assert_nothing_is_taught(value, student)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_nan_or_infinite_logit_propagates_to_the_cross_entropy(poison):
    logits = student_logits()
    with torch.no_grad():
        logits[1, 3, 2, 3] = poison
    value = fastmt.cross_entropy(logits, torch.zeros(2, 9, 11, dtype=torch.uint8))
    gradient = gradient_of(value, logits)
    assert value.isnan()
    assert gradient[1, :, 2, 3].isnan().any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("size", [(9, 11), (18, 22)])
def test_weights_that_cancel_out_teach_nothing_whatever_the_logits(poison, size):
    logits, labels = student_logits(), torch.zeros(2, *size, dtype=torch.int64)
    with torch.no_grad():
        logits[0, 0, 0, 0] = poison
    weight = torch.zeros(2, *size)
    weight[:, 0, 0] = torch.tensor([1.0, -1.0])
    value = fastmt.cross_entropy(logits, labels, pixel_weight=weight, normalize="weight")
    assert_nothing_is_taught(value, logits)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_class_the_student_excludes_has_probability_zero(loss):
    student = student_logits()
    with torch.no_grad():
        student[:, 2] = -torch.inf
    teacher = random_logits(SHAPE, 2)
    teacher[:, 2] = -torch.inf
    value = fastmt.consistency_loss(student, teacher, loss=loss, weight="none")
    rest = [0, 1, 3, 4]
    expected = fastmt.consistency_loss(
        student.detach()[:, rest], teacher[:, rest], loss=loss, weight="none"
    )
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert gradient_of(value, student)[:, rest].isfinite().all()


@pytest.mark.parametrize("others", [1, 4])
def test_bce_of_a_student_that_excludes_all_classes_but_the_right_one_is_zero(others):
    student = torch.full((1, 1 + others, 1, 3), -torch.inf)
    student[:, 0] = 2.0
    teacher = student.clone()
    student.requires_grad_()
    value = fastmt.consistency_loss(student, teacher, loss="bce", weight="none")
    assert value == 0
    assert not gradient_of(value, student).any()


@pytest.mark.parametrize("classes", [2, 5, 19])
def test_bce_of_all_classes_excluded_but_one_has_the_gradient_of_classes_far_below(classes):
    teacher, gradients = random_logits((1, classes, 1, 3), 2), []
    for logit in (-torch.inf, -1e4):
        student = torch.full((1, classes, 1, 3), logit)
        student[:, 1] = 2.0
        student.requires_grad_()
        value = fastmt.consistency_loss(student, teacher, loss="bce", weight="none")
        gradients.append(gradient_of(value, student))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    assert gradients[0].all()


def test_bce_of_a_class_far_above_all_others_leaves_these_their_shares():
    gradients = []
    for logit in (200.0, 1e5, 1e30):
        student = random_logits(SHAPE, 1)
        student[:, 3] = logit
        student.requires_grad_()
        value = fastmt.consistency_loss(student, random_logits(SHAPE, 2), loss="bce", weight="none")
        gradients.append(gradient_of(value, student))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("offset", [-(2.0**17), 2.0**17])
def test_an_offset_of_all_classes_alike_changes_neither_loss_nor_gradient(loss, offset):
    logits, results = (random_logits(SHAPE, 1) * 64).round() / 64, []
    for student in (logits, logits + offset):
        student.requires_grad_()
        value = fastmt.consistency_loss(student, random_logits(SHAPE, 2), loss=loss, weight="none")
        results.append((value, gradient_of(value, student)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("size", [(1, 5), (2, 10)])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_bce_of_one_class_is_nan_where_its_logit_is_not_finite_and_else_nothing(poison, size):
    student = torch.zeros(1, 1, 1, 5)
    student[..., 4] = poison
    student.requires_grad_()
    options = {"loss": "bce", "weight": "none", "size": size}
    value = fastmt.consistency_loss(student, torch.zeros(1, 1, 1, 5), **options)
    gradient = gradient_of(value, student)[0, 0, 0]
    assert value.isnan() and gradient[4].isnan()
    if size == (1, 5):  # how far it reaches up-sampled, test_upsampling_borders tells
        assert not gradient[:4].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_a_class_without_weight_counts_nothing_though_its_logit_excludes_it(smoothing):
    labels = torch.arange(2 * 9 * 11).view(2, 9, 11) % 5
    options = {"label_smoothing": smoothing, "normalize": "all"}
    results = []
    for logit in (-torch.inf, -1e4):  # of probability 0 both
        logits = student_logits()
        with torch.no_grad():
            logits[:, 4] = logit
        weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0])
        value = fastmt.cross_entropy(logits, labels, class_weight=weight, **options)
        results.append((value, gradient_of(value, logits)))
    torch.testing.assert_close(*results)


def test_smoothing_alone_makes_an_excluded_label_infinite_and_not_nan():
    logits = student_logits()
    with torch.no_grad():
        logits[:, 4] = -torch.inf
    labels = torch.full((2, 9, 11), 4)
    value = fastmt.cross_entropy(logits, labels, label_smoothing=1.0)
    assert value == torch.inf
    assert gradient_of(value, logits).isfinite().all()


def test_negative_infinity_of_an_unlabelled_class_is_harmless():
    logits = student_logits()
    with torch.no_grad():
        logits[:, 4] = -torch.inf
    labels = torch.ones(2, 9, 11, dtype=torch.uint8)
    expected = torch.nn.functional.cross_entropy(logits[:, :4], labels.long())
    for class_weight in (None, torch.ones(5)):
        value = fastmt.cross_entropy(logits, labels, class_weight=class_weight)
        torch.testing.assert_close(value, expected)
        assert gradient_of(value, logits).isfinite().all()


@pytest.mark.parametrize("size", [(9, 11), (18, 22)])
def test_an_infinite_weight_of_a_class_without_labels_is_harmless(size):
    logits, labels = student_logits(), torch.ones(2, *size, dtype=torch.uint8)
    labels[:, 2:5] = 3
    shares = torch.bincount(labels.flatten(), minlength=5) / labels.numel()
    labels[:, 5] = 255  # which kernels read as class 0
    values = [
        fastmt.cross_entropy(logits, labels, class_weight=weight, normalize="weight")
        for weight in (1 / shares, (1 / shares).nan_to_num(posinf=1.0))
    ]
    assert (1 / shares).isinf().sum() == 3
    assert torch.equal(*values)
    assert torch.equal(*(gradient_of(value, logits) for value in values))
