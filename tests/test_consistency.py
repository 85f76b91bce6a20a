"""The consistency kernels against the float64 reference: loss, gradient and statistics."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import (
    DTYPES,
    LAYOUTS,
    laid_out,
    random_logits,
    shapes,
    teachers,
    threshold_near,
    thresholds_by_class,
)
from tolerances import assert_gradient_close, assert_loss_close

import fastmt
from fastmt import reference
from fastmt.confidence import KINDS
from fastmt.consistency import CLASS_REDUCTIONS, LOSSES, NORMALIZATIONS, WEIGHTS

pytestmark = pytest.mark.usefixtures("kernels")

OPTIONS = st.fixed_dictionaries(
    {
        "loss": st.sampled_from(LOSSES),
        "class_reduction": st.sampled_from(CLASS_REDUCTIONS),
        "confidence": st.sampled_from(KINDS),
        "weight": st.sampled_from(WEIGHTS),
        "normalize": st.sampled_from(NORMALIZATIONS),
        "strict": st.booleans(),
        "temperature": st.sampled_from([1.0, 0.5, 2.0]),
    }
)


def shares(members, shape, options):
    """The weight of each pixel over the denominator: the gradient of "ce" at equal logits."""
    equal = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    loss = reference.consistency_loss(equal, members, **{**options, "loss": "ce"})
    (gradient,) = torch.autograd.grad(loss, equal)
    return gradient.amin(1) / (1 / shape[1] - 1) if shape[1] > 1 else None


def unit_of(share, members, options):
    """What the rounding of gradients is relative to; a weight that is a score rounds as 1 does."""
    if share is None or not share.any():
        return 1.0
    if options.get("weight") != "confidence":
        return share.max().item()
    kind, temperature = options.get("confidence", "max_prob"), options.get("temperature", 1.0)
    score = reference.softmax_confidence(members, kind=kind, temperature=temperature).score
    return (share / score)[share > 0].max().item()


def assert_consistency_is_the_reference(student, members, **options):
    student = student.detach().requires_grad_()
    loss, stats = fastmt.consistency_loss(student, members, return_stats=True, **options)
    (gradient,) = torch.autograd.grad(loss, student)

    truth = student.detach().double().contiguous().requires_grad_()
    members = [m.double() for m in members]
    for name in ("threshold", "pixel_weight"):
        if torch.is_tensor(options.get(name)):
            options[name] = options[name].double()
    expected, expected_stats = reference.consistency_loss(
        truth, members, return_stats=True, **options
    )
    (expected_gradient,) = torch.autograd.grad(expected, truth)
    share = shares(members, student.shape, options)

    assert loss.dtype == torch.float32
    assert gradient.dtype == student.dtype
    assert_loss_close(loss, expected, student.dtype)
    unit = unit_of(share, members, options)
    assert_gradient_close(gradient, expected_gradient, student.dtype, unit)
    if share is not None:
        assert not gradient.movedim(1, -1)[share == 0].any()
    torch.testing.assert_close(stats.selected, expected_stats.selected, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.mean_score, expected_stats.mean_score, rtol=1e-5, atol=1e-6)


def maps(shape, kind, layout, seed):
    """pixel_weight and valid of the output pixels; about a fifth of each is zero."""
    generator = torch.Generator().manual_seed(seed)
    out = (shape[0], *shape[2:])
    weight, valid = torch.rand(2, *out, generator=generator)
    weight = torch.where(weight < 0.2, 0, 2 * weight).to(kind)
    return laid_out(weight, layout, class_dim=False), laid_out(valid > 0.2, layout, class_dim=False)


@settings(max_examples=80)
@given(
    shape=shapes(st.integers(1, 40) | st.integers(41, 200)),
    dtype=st.sampled_from(DTYPES),
    teacher_dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    options=OPTIONS,
    limit=st.sampled_from(["float", "0-dim", "by class"]),
    quantile=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    map_dtype=st.sampled_from([None, torch.float32, torch.float16, torch.float64]),
    with_valid=st.booleans(),
    scale=st.sampled_from([0.3, 3.0, 15.0]),
    seed=st.integers(0, 1000),
)
def test_loss_gradient_and_statistics_are_those_of_the_reference(
    shape,
    dtype,
    teacher_dtypes,
    layouts,
    options,
    limit,
    quantile,
    map_dtype,
    with_valid,
    scale,
    seed,
):
    student = laid_out(random_logits(shape, seed + 10, scale, dtype), layouts[0])
    temperature, kind = options["temperature"], options["confidence"]
    members = teachers(shape, teacher_dtypes, layouts[1], scale, temperature, seed)
    score, label = reference.softmax_confidence(
        [m.double() for m in members], kind=kind, temperature=temperature
    )
    threshold = threshold_near(score, quantile)
    if limit == "0-dim":
        threshold = torch.tensor(threshold)
    if limit == "by class":
        threshold = thresholds_by_class(score, label, shape[1], quantile)
    weight, valid = maps(shape, map_dtype or torch.float32, layouts[2], seed)
    assert_consistency_is_the_reference(
        student,
        members,
        threshold=threshold,
        pixel_weight=None if map_dtype is None else weight,
        valid=valid if with_valid else None,
        **options,
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_loss_weight_and_denominator(loss, weight):
    shape = (2, 5, 7, 19)
    student = random_logits(shape, 1)
    members = teachers(shape, [torch.float32], "contiguous", seed=2)
    _, valid = maps(shape, torch.float32, "contiguous", 3)
    for i, (normalize, kind) in enumerate(itertools.product(NORMALIZATIONS, KINDS)):
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
            valid=valid if i % 2 else None,
        )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [1, 2, 31, 33, 1000, 4096])
def test_any_number_of_classes(loss, classes):
    shape = (2, classes, 3, 7)
    members = teachers(shape, [torch.float32] * 2, "contiguous", seed=2)
    assert_consistency_is_the_reference(random_logits(shape, 1), members, loss=loss, weight="none")


@pytest.mark.parametrize("pixels", [1, 7, 15, 16, 17, 31, 33, 255, 256, 257, 4097])
def test_any_number_of_pixels(pixels):
    shape = (1, 3, pixels)
    members = teachers(shape, [torch.float32], "contiguous", seed=pixels)
    score = reference.softmax_confidence(members[0].double()).score
    assert_consistency_is_the_reference(
        random_logits(shape, 0), members, threshold=threshold_near(score, 0.5)
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [30.0, 1e3, 1e4])
def test_far_apart_and_shifted_logits(loss, dtype, scale):
    shape = (2, 6, 5, 9)
    student = (random_logits(shape, 1, scale) + 100).to(dtype)
    members = [m + 100 for m in teachers(shape, [torch.float32], "contiguous", scale, seed=2)]
    assert_consistency_is_the_reference(student, members, loss=loss, weight="none")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("distance", [0.0, 1e-3, 1.0])
def test_student_near_a_confident_teacher(loss, distance):
    shape = (1, 4, 300)
    members = teachers(shape, [torch.float32], "contiguous", 15.0, seed=2)
    student = members[0] + random_logits(shape, 1, distance)
    assert_consistency_is_the_reference(student, members, loss=loss, threshold=0.9)


def test_a_float16_gradient_of_many_pixels_is_not_divided_before_the_loss_scale():
    student, teacher = (random_logits((1, 3, 20_000), i, 0.02, torch.float16) for i in (1, 2))
    gradients = []
    for z, q in ((student, teacher), (student.double(), teacher.double())):
        z.requires_grad_()
        run = fastmt.consistency_loss if z.dtype == torch.float16 else reference.consistency_loss
        loss = run(z, q, loss="kl", weight="none")
        gradients += torch.autograd.grad(65536 * loss, z)
    assert_gradient_close(*gradients, torch.float16)


@pytest.mark.parametrize("size", [(6, 8), (12, 16)])
def test_a_float16_gradient_of_a_mean_over_many_classes_is_as_exact_as_that_of_their_sum(size):
    student, teacher = (random_logits((1, 300, 6, 8), i, 1.0, torch.float16) for i in (1, 2))
    gradients = []
    for class_reduction, factor in (("mean", 300), ("sum", 1)):
        student.requires_grad_()
        options = {"class_reduction": class_reduction, "threshold": 0.02, "normalize": "selected"}
        loss = fastmt.consistency_loss(student, teacher, size=size, **options)
        gradients += torch.autograd.grad(65536 * factor * loss, student)
    assert gradients[1].any()
    torch.testing.assert_close(*gradients, rtol=2e-3, atol=1e-6)


def test_bce_counts_classes_too_unlikely_to_change_1():
    student = torch.zeros(1, 1000)
    student[:, 0] = 17.5  # 1 - exp(-17.5) is 1 in float32
    call = {"loss": "bce", "weight": "none"}
    value = fastmt.consistency_loss(student, 20 * student, **call)
    expected = reference.consistency_loss(student.double(), 20 * student.double(), **call)
    torch.testing.assert_close(value.double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_per_class_thresholds_that_are_a_strided_view(weight):
    shape = (1, 6, 500)
    members = teachers(shape, [torch.float32], "contiguous", seed=2)
    score, label = reference.softmax_confidence(members[0].double())
    limits = thresholds_by_class(score, label, 6, 0.5)
    strided = torch.stack([limits, torch.zeros(6)], 1)[:, 0]
    assert_consistency_is_the_reference(
        random_logits(shape, 1), members, threshold=strided, weight=weight
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_lies_in_memory_like_the_student(layout, dtype):
    student = laid_out(random_logits((2, 5, 6, 7), 0, dtype=dtype), layout).requires_grad_()
    loss = fastmt.consistency_loss(student, random_logits((2, 5, 6, 7), 1), weight="none")
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.stride() == torch.empty_like(student).stride()


def test_a_step_along_the_gradient_of_a_network_is_that_of_the_reference():
    torch.manual_seed(0)
    network, images = torch.nn.Conv2d(3, 5, 3), torch.rand(2, 3, 12, 12)
    teacher = random_logits((2, 5, 10, 10), 1)
    gradients = []
    for backend in ("cpp", "eager"):
        network.zero_grad()
        with fastmt.backend(backend):
            (3 * fastmt.consistency_loss(network(images), teacher, threshold=0.5)).backward()
        gradients.append(network.weight.grad.clone())
    assert_gradient_close(gradients[0], gradients[1].double(), torch.float32)
