"""The dense kernels against the float64 reference: every option, layout and number of classes."""

from __future__ import annotations

import itertools

import pytest
import small
import test_consistency
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import (
    DTYPES,
    LAYOUTS,
    laid_out,
    random_logits,
    teachers,
    threshold_near,
    thresholds_by_class,
    without_ties,
)
from test_confidence import assert_confidence_is_the_reference
from test_consistency import assert_consistency_is_the_reference
from test_cross_entropy import assert_cross_entropy_is_the_reference, random_labels

import fastmt
from fastmt import kernels, reference
from fastmt.confidence import KINDS
from fastmt.consistency import CLASS_REDUCTIONS, LOSSES, NORMALIZATIONS, WEIGHTS
from fastmt.cross_entropy import NORMALIZATIONS as CE_NORMALIZATIONS
from fastmt.kernels import (
    dense_confidence,
    dense_consistency,
    dense_cross_entropy,
    launch,
    sums,
    views,
)

pytestmark = pytest.mark.usefixtures("kernels")


@settings(max_examples=40)
@given(
    shape=small.shapes(small.CLASSES),
    dtypes=st.tuples(small.DTYPE, st.lists(small.DTYPE, min_size=1, max_size=3)),
    layouts=st.tuples(*[small.LAYOUT] * 3),
    options=test_consistency.OPTIONS,
    by_class=st.booleans(),
    quantile=st.sampled_from([0.0, 0.3, 0.9]),
    weighted=st.booleans(),
    with_valid=st.booleans(),
    scale=st.sampled_from([0.3, 3.0, 15.0]),
    seed=st.integers(0, 1000),
)
def test_consistency_loss_gradient_and_statistics_are_those_of_the_reference(
    shape, dtypes, layouts, options, by_class, quantile, weighted, with_valid, scale, seed
):
    student = laid_out(random_logits(shape, seed + 10, scale, dtypes[0]), layouts[0])
    temperature, kind = options["temperature"], options["confidence"]
    members = teachers(shape, dtypes[1], layouts[1], scale, temperature, seed)
    score, label = reference.softmax_confidence(
        [m.double() for m in members], kind=kind, temperature=temperature
    )
    threshold = threshold_near(score, quantile)
    if by_class:
        threshold = thresholds_by_class(score, label, shape[1], quantile)
    weight, valid = test_consistency.maps(shape, torch.float32, layouts[2], seed)
    assert_consistency_is_the_reference(
        student,
        members,
        threshold=threshold,
        pixel_weight=weight if weighted else None,
        valid=valid if with_valid else None,
        **options,
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_weight_denominator_and_kind_of_confidence(loss):
    shape = (2, 5, 7, 19)
    student, members = random_logits(shape, 1), teachers(shape, [torch.float32], "contiguous")
    _, valid = test_consistency.maps(shape, torch.float32, "contiguous", 3)
    cases = itertools.product(WEIGHTS, NORMALIZATIONS)
    for i, (weight, normalize) in enumerate(cases):
        kind = KINDS[i % 3]
        score = reference.softmax_confidence([members[0].double()], kind=kind).score
        assert_consistency_is_the_reference(
            student,
            members,
            loss=loss,
            weight=weight,
            normalize=normalize,
            confidence=kind,
            class_reduction=CLASS_REDUCTIONS[i % 2],
            threshold=threshold_near(score, 0.6),
            valid=valid if i // 4 % 2 else None,
        )


@pytest.mark.parametrize("classes", [1, 2, 31, 33, 81, 150, 1000, 4096])
def test_any_number_of_classes(classes):
    shape = (1, classes, 3)
    for loss, dtype in zip(LOSSES, itertools.cycle(DTYPES), strict=False):
        members = teachers(shape, [dtype] * 2, "contiguous", seed=2)
        student = random_logits(shape, 1, dtype=dtype)
        assert_consistency_is_the_reference(student, members, loss=loss, weight="none")
        members = without_ties([random_logits(shape, 0)])
        assert_confidence_is_the_reference(members, kind=KINDS[LOSSES.index(loss) % 3])
    labels = random_labels(shape, 0, ignore_index=-100)
    for smoothing in (0.0, 0.1):
        assert_cross_entropy_is_the_reference(
            random_logits(shape, 1), labels, label_smoothing=smoothing, ignore_index=-100
        )


@pytest.mark.parametrize("pixels", [1, 127, 128, 129, 255, 256, 257, 1025])
def test_any_number_of_pixels(pixels):
    shape = (1, 3, pixels)
    members = teachers(shape, [torch.float32], "contiguous", seed=pixels)
    score = reference.softmax_confidence(members[0].double()).score
    student = random_logits(shape, 0)
    assert_consistency_is_the_reference(student, members, threshold=threshold_near(score, 0.5))
    assert_confidence_is_the_reference(members)
    assert_cross_entropy_is_the_reference(student, random_labels(shape, pixels))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_far_apart_and_shifted_logits(loss, scale):
    shape = (2, 6, 5, 9)
    student = random_logits(shape, 1, scale) + 100
    members = [m + 100 for m in teachers(shape, [torch.float32], "contiguous", scale, seed=2)]
    assert_consistency_is_the_reference(student, members, loss=loss, weight="none")
    assert_cross_entropy_is_the_reference(student, random_labels(shape, 0), label_smoothing=0.1)


@pytest.mark.parametrize("loss", LOSSES)
def test_student_near_a_confident_teacher(loss):
    shape = (1, 4, 300)
    members = teachers(shape, [torch.float32], "contiguous", 15.0, seed=2)
    student = members[0] + random_logits(shape, 1, 1e-3)
    assert_consistency_is_the_reference(student, members, loss=loss, threshold=0.9)


@settings(max_examples=25)
@given(
    shape=small.shapes(small.CLASSES),
    dtypes=st.lists(small.DTYPE, min_size=1, max_size=3),
    layout=small.LAYOUT,
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_score_and_label_are_those_of_the_reference(
    shape, dtypes, layout, kind, temperature, scale, seed
):
    members = teachers(shape, dtypes, layout, scale, temperature, seed)
    assert_confidence_is_the_reference(members, kind=kind, temperature=temperature)


@settings(max_examples=30)
@given(
    shape=small.shapes(small.CLASSES),
    dtype=small.DTYPE,
    layouts=st.tuples(*[small.LAYOUT] * 3),
    label_dtype=st.sampled_from([torch.uint8, torch.int64]),
    normalize=st.sampled_from(CE_NORMALIZATIONS),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    weighted=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_cross_entropy_and_its_gradient_are_those_of_the_reference(
    shape, dtype, layouts, label_dtype, normalize, smoothing, weighted, seed
):
    logits = laid_out(random_logits(shape, seed, 3.0, dtype), layouts[0])
    labels = laid_out(random_labels(shape, seed + 1, label_dtype), layouts[1], class_dim=False)
    generator = torch.Generator().manual_seed(seed)
    by_pixel = torch.rand(labels.shape, generator=generator)
    by_pixel = laid_out(torch.where(by_pixel < 0.2, 0, by_pixel), layouts[2], class_dim=False)
    by_class = 0.1 + torch.rand(shape[1], generator=generator)
    assert_cross_entropy_is_the_reference(
        logits,
        labels,
        normalize=normalize,
        label_smoothing=smoothing,
        pixel_weight=by_pixel if weighted[0] else None,
        class_weight=by_class if weighted[1] else None,
    )


def everything(student, teacher, labels):
    """Scalars of both losses, and what each pixel gets."""
    z = student.detach().requires_grad_()
    loss, stats = fastmt.consistency_loss(z, teacher, threshold=0.5, return_stats=True)
    supervised = fastmt.cross_entropy(z, labels, label_smoothing=0.1)
    gradients = [torch.autograd.grad(value, z)[0] for value in (loss, supervised)]
    scalars = torch.stack([loss.detach(), *stats, supervised.detach()])
    return scalars, [*gradients, *fastmt.softmax_confidence(teacher)]


def assert_same(left, right):
    """Sums may be taken in another order; pixels are the same to the bit."""
    torch.testing.assert_close(left[0], right[0], rtol=1e-6, atol=0)
    for a, b in zip(left[1], right[1], strict=True):
        assert not a.isnan().any()
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_64_bit_offsets_and_layouts_give_the_same_pixels(layout, dtype, monkeypatch):
    shape = (2, 19, 5, 31)
    student, teacher = (random_logits(shape, seed, dtype=dtype) for seed in (1, 2))
    labels = random_labels(shape, 0, torch.uint8)
    expected = everything(student, teacher, labels)
    monkeypatch.setattr(views, "NARROW", 0)
    in_64_bits = small.offsets_of(
        monkeypatch, dense_confidence, dense_consistency, dense_cross_entropy
    )
    student, teacher = laid_out(student, layout), laid_out(teacher, layout)
    labels = laid_out(labels, layout, class_dim=False)
    assert_same(expected, everything(student, teacher, labels))
    assert in_64_bits
    assert all(in_64_bits)


def test_sums_of_many_programs_are_taken_in_two_steps(monkeypatch):
    shape = (1, 3, 1025)
    student, teacher = (random_logits(shape, seed) for seed in (1, 2))
    labels = random_labels(shape, 0)
    expected = everything(student, teacher, labels)
    monkeypatch.setattr(sums, "FEW", 2)
    monkeypatch.setattr(sums, "BLOCK", 2)  # programs that one adds up in the first step
    launch.forget()
    assert_same(expected, everything(student, teacher, labels))
    labels[0, 2], labels[0, 1000] = 9, 7
    with pytest.raises(ValueError, match="^labels: got label 7"):
        fastmt.cross_entropy(student, labels)


def test_a_wrong_label_is_read_as_no_class_and_poisons_loss_and_gradient():
    labels = torch.tensor([[0, 20_000_000_000, -1, 2, 255]])
    logits = random_logits((1, 3, 5), 0)
    loss, scale, gradient, wrong, label = kernels.cross_entropy(
        logits, labels, None, torch.ones(3), [255, 1], 0.0, False, True
    )
    assert loss.isnan()
    assert scale.isnan()
    assert gradient.isfinite().all()
    assert (wrong, label) == (2, -1)
