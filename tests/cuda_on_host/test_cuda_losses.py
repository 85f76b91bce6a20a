"""The losses of csrc/cuda are those of the reference: options, dtypes, layouts, class counts."""

from __future__ import annotations

import itertools

import pytest
import torch
from agreement import FIXED, assert_consistency
from operands import (
    DTYPES,
    LAYOUTS,
    laid_out,
    random_logits,
    threshold_near,
    thresholds_by_class,
)
from test_consistency import (  # noqa: F401, run here on these kernels too
    test_a_float16_gradient_of_a_mean_over_many_classes_is_as_exact_as_that_of_their_sum,
)
from test_not_finite import (  # noqa: F401, and here
    test_a_ratio_of_0_teaches_nothing_whatever_the_weights_of_pixels,
    test_where_the_sum_of_weights_is_not_finite_loss_and_gradient_are_nan,
)
from test_upsampling import assert_cross_entropy_is_the_reference, decided

import fastmt
from fastmt import reference
from fastmt.confidence import KINDS
from fastmt.consistency import CLASS_REDUCTIONS, LOSSES, NORMALIZATIONS, WEIGHTS
from fastmt.cross_entropy import NORMALIZATIONS as CE_NORMALIZATIONS


@pytest.mark.parametrize("classes", [*FIXED, 7])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_loss_weight_score_and_denominator(classes, loss, weight):
    student, teacher = (random_logits((2, classes, 3, 4), seed, 4.0) for seed in (1, 2))
    for i, (normalize, kind) in enumerate(itertools.product(NORMALIZATIONS, KINDS)):
        assert_consistency(
            student,
            [teacher],
            (11, 14),
            loss=loss,
            weight=weight,
            normalize=normalize,
            confidence=kind,
            class_reduction=CLASS_REDUCTIONS[i % 2],
            strict=i % 2 == 0,
            pixel_weight=random_logits((2, 11, 14), i).clamp(0, 2) if i % 3 else None,
        )


@pytest.mark.parametrize("classes", [*FIXED, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_and_layout(classes, dtype, layout):
    student = laid_out(random_logits((2, classes, 4, 5), 1, 4.0, dtype), layout)
    teacher = laid_out(random_logits((2, classes, 4, 5), 2, 4.0, dtype), layout)
    for loss in ("mse", "kl"):
        gradient = assert_consistency(student, [teacher], (13, 17), loss=loss)
        assert gradient.stride() == torch.empty_like(student).stride()
    labels = torch.randint(classes, (2, 13, 17), generator=torch.Generator().manual_seed(0))
    for smoothing in (0.0, 0.1):
        assert_cross_entropy_is_the_reference(
            student, labels, align_corners=False, label_smoothing=smoothing
        )


@pytest.mark.parametrize("classes", [*FIXED, 6])
@pytest.mark.parametrize("loss", ["mse", "ce", "js"])
def test_a_threshold_for_each_class_and_a_temperature(classes, loss):
    student, teacher = (random_logits((1, classes, 4, 4), seed, 4.0) for seed in (1, 2))
    size = (21, 22)
    big = reference.upsample(teacher.double() / 2, size, False)
    score, label = reference.softmax_confidence(big)
    limits = thresholds_by_class(score, label, classes, 0.5)
    assert_consistency(student, [teacher], size, loss=loss, threshold=limits, temperature=2.0)


@pytest.mark.parametrize("classes", [150, 1000, 4096])
def test_any_number_of_classes(classes):
    student, teacher = (random_logits((1, classes, 2, 2), seed) for seed in (1, 2))
    for loss in LOSSES:
        assert_consistency(student, [teacher], (4, 5), loss=loss, weight="none")
    labels = torch.arange(20).view(1, 4, 5) * (classes - 1) // 19
    assert_cross_entropy_is_the_reference(student, labels, align_corners=False)


@pytest.mark.parametrize("classes", [19, 4])
def test_labels_out_of_range_are_counted_and_never_a_silent_error(operations, classes):
    logits = random_logits((2, classes, 3, 4), 1)
    labels = torch.randint(classes, (2, 12, 16), generator=torch.Generator().manual_seed(0))
    labels[0, 3, 5], labels[1, 0, 0], labels[1, 11, 15] = classes, -1, 2**40
    value, scale, gradient, wrong = operations.cross_entropy(
        logits, labels, None, None, [255, 1], 0.0, False, True
    )
    assert wrong.item() == 3
    assert value.isnan()
    assert scale.isnan()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("classes", [19, 4])
def test_a_nan_score_never_passes_and_its_pixels_leave_no_trace(classes):
    student, teacher = (random_logits((1, classes, 3, 9), seed, 4.0) for seed in (1, 2))
    teacher[0, 1, 1, 4] = torch.nan
    student[0, 2, 1, 4] = torch.nan
    student.requires_grad_()
    loss = fastmt.consistency_loss(student, teacher, threshold=0.1, size=(12, 36))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("classes", [19, 4])
def test_an_infinite_weight_of_a_class_whose_pixels_have_none_leaves_no_trace(classes):
    labels = torch.arange(12 * 16).view(1, 12, 16) % classes
    class_weight = torch.ones(classes)
    class_weight[2] = torch.inf
    logits = random_logits((1, classes, 3, 4), 1)
    options = {"class_weight": class_weight, "pixel_weight": (labels != 2).float()}
    loss = fastmt.cross_entropy(logits, labels, normalize="weight", **options)
    expected = reference.cross_entropy(logits.double(), labels, normalize="weight", **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("classes", [*FIXED, 7])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("normalize", CE_NORMALIZATIONS)
def test_pixels_whose_labels_have_no_weight_leave_no_trace(classes, smoothing, normalize):
    logits = random_logits((2, classes, 3, 6), 1)
    logits[..., 4:] = torch.nan
    labels = torch.ones(2, 12, 24, dtype=torch.uint8)
    labels[..., 12:] = 2
    class_weight = torch.zeros(classes)
    if not smoothing:  # else the other classes would count in each pixel
        class_weight[:2] = 1.5
    logits.requires_grad_()
    options = {"class_weight": class_weight, "normalize": normalize}
    loss = fastmt.cross_entropy(logits, labels, label_smoothing=smoothing, **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    clean = logits.detach().double().nan_to_num(0.0).requires_grad_()
    expected = reference.cross_entropy(clean, labels, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), *torch.autograd.grad(expected, clean))


@pytest.mark.parametrize("classes", [19, 4])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_ratio_of_0_leaves_no_trace_of_a_nan(classes, normalize):
    student = torch.full((1, classes, 3, 5), torch.nan).requires_grad_()
    options = {"weight": "ratio", "threshold": 2.0, "normalize": normalize, "size": (12, 20)}
    loss = fastmt.consistency_loss(student, torch.zeros(1, classes, 3, 5), **options)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("classes", [*FIXED, 7])
def test_a_nan_weight_of_a_pixel_that_does_not_count_leaves_no_trace(classes):
    student, teacher = (random_logits((2, classes, 3, 5), seed, 4.0) for seed in (1, 2))
    score, valid = decided([teacher], (12, 20), False, "max_prob")
    threshold = threshold_near(score, 0.5)
    counts = valid & (score >= threshold)
    weight = torch.where(counts, 1.5, torch.nan)
    assert_consistency(
        student, [teacher], (12, 20), threshold=threshold, valid=valid, pixel_weight=weight
    )
    labels = torch.where(counts, 1, 255)
    assert_cross_entropy_is_the_reference(student, labels, align_corners=False, pixel_weight=weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [*FIXED, 7])
@pytest.mark.parametrize("members", [1, 3, 11])
def test_a_certain_teacher_scores_exactly_one(kind, classes, members):
    student = random_logits((1, classes, 3, 5), 0)
    teacher = torch.full((1, classes, 3, 5), -200.0)
    teacher[:, 2] = 40 * torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    options = {"confidence": kind, "threshold": 1.0, "size": (24, 40), "return_stats": True}
    for strict, selected in ((False, 1), (True, 0)):
        options["strict"] = strict
        _, stats = fastmt.consistency_loss(student, [teacher] * members, **options)
        assert stats.selected == selected
        assert stats.mean_score == 1


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(("classes", "members"), [(19, 1), (19, 2), (7, 1)])
@pytest.mark.parametrize("at", [0, 3])
def test_the_label_of_a_pixel_that_is_nan_is_that_of_the_reference(poison, classes, members, at):
    student, teacher = (random_logits((1, classes, 2, 6), seed) for seed in (0, 1))
    teacher[0, at] = poison
    for kind in KINDS:
        options = {"loss": "ce", "weight": "none", "confidence": kind, "size": (8, 24)}
        loss = fastmt.consistency_loss(student, [teacher] * members, **options)
        expected = reference.consistency_loss(student.double(), [teacher.double()], **options)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("classes", [*FIXED, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_is_excluded_everywhere_has_probability_zero(classes, kind):
    student, teacher = (random_logits((1, classes, 3, 5), seed, 4.0) for seed in (1, 2))
    student[:, -1] = teacher[:, -1] = -torch.inf
    kept = student[:, :-1].double(), [teacher[:, :-1].double()]
    for loss, align_corners in itertools.product(("mse", "ce", "kl"), (False, True)):
        options = {"loss": loss, "confidence": kind, "weight": "none"}
        options |= {"size": (17, 33), "align_corners": align_corners}
        value = fastmt.consistency_loss(student, teacher, **options)
        expected = reference.consistency_loss(*kept, **options)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_alone_is_the_same_loss(operations):
    student, teacher = (random_logits((2, 19, 5, 6), seed, 4.0) for seed in (1, 2))
    call = (student, [teacher], torch.tensor([0.5]), None, None, [0, 0, 0, 0, 0, 0], 1.0, [20, 24])
    alone, both = (operations.consistency_loss(*call, False, wanted) for wanted in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(alone[:4], both[:4], strict=True))
    assert alone[4].numel() == 0


def test_an_empty_batch_is_no_loss(operations):
    logits = torch.zeros(0, 19, 4, 4)
    options = [0, 0, 0, 0, 0, 0]
    loss, *_, gradient = operations.consistency_loss(
        logits, [logits], torch.tensor([0.5]), None, None, options, 1.0, [8, 8], False, True
    )
    assert loss.item() == 0
    assert gradient.shape == logits.shape
