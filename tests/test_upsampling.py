"""Up-sampling inside the kernels is interpolation before the dense operation, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import DTYPES, GAP, LAYOUTS, laid_out, random_logits, threshold_near
from tolerances import TOLERANCES, assert_gradient_close, assert_loss_close

import fastmt
from fastmt import reference
from fastmt.confidence import KINDS
from fastmt.consistency import LOSSES, NORMALIZATIONS, WEIGHTS

pytestmark = pytest.mark.usefixtures("kernels")

SIDES = st.integers(1, 9)
OUT = st.integers(1, 40)
RATIOS = [  # (low resolution, output) as networks have them, integer scales and not
    ((65, 3), (512, 24)),
    ((97, 3), (769, 24)),
    ((101, 3), (801, 24)),
    ((3, 65), (24, 512)),
    ((16, 16), (64, 64)),
    ((16, 17), (31, 33)),
    ((8, 8), (5, 3)),
    ((1, 1), (7, 9)),
    ((1, 9), (8, 1)),
    ((40, 5), (40, 9)),
    ((2, 3), (3, 3000)),
]


def upsampled(tensor, size, align_corners):
    return F.interpolate(tensor.double(), size, mode="bilinear", align_corners=align_corners)


def decided(members, size, align_corners, kind):
    """The float64 score, and where rounding cannot change the label."""
    big = [upsampled(m, size, align_corners) for m in members]
    q = torch.stack([m.softmax(1) for m in big]).mean(0)
    top = q.topk(2, dim=1).values
    return reference.confidence_score(q, kind), top[:, 0] - top[:, 1] > GAP


def reached(weight, shape, size, align_corners):
    """Which low-resolution pixels a map of output weights touches."""
    low = torch.zeros(shape[0], 1, *shape[2:], dtype=torch.float64, requires_grad=True)
    (touched,) = torch.autograd.grad(
        (upsampled(low, size, align_corners).squeeze(1) * weight).sum(), low
    )
    return touched.squeeze(1) != 0


def assert_consistency_is_the_reference(student, members, size, align_corners, **options):
    student = student.detach().requires_grad_()
    options = {**options, "size": size, "align_corners": align_corners}
    loss, stats = fastmt.consistency_loss(student, members, return_stats=True, **options)
    (gradient,) = torch.autograd.grad(loss, student)
    truth = student.detach().double().contiguous().requires_grad_()
    expected, expected_stats = reference.consistency_loss(
        truth, [m.double() for m in members], return_stats=True, **options
    )
    (expected_gradient,) = torch.autograd.grad(expected, truth)
    assert gradient.dtype == student.dtype
    assert_loss_close(loss, expected, student.dtype)
    assert_gradient_close(gradient, expected_gradient, student.dtype, unit=1.0)
    torch.testing.assert_close(stats.selected, expected_stats.selected, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.mean_score, expected_stats.mean_score, rtol=1e-5, atol=2e-6)
    return gradient


def assert_confidence_is_the_reference(members, kind, size, align_corners):
    score, valid = decided(members, size, align_corners, kind)
    confidence = fastmt.softmax_confidence(
        members, kind=kind, size=size, align_corners=align_corners
    )
    error = (confidence.score.double() - score).abs().max().item()
    assert error <= TOLERANCES[torch.float32].score
    if len(members) == 1:
        label = upsampled(members[0], size, align_corners).argmax(1)
        assert torch.equal(confidence.label[valid], label[valid])


def assert_consistency_is_that_of_interpolated_logits(
    batch,
    classes,
    low,
    teacher_low,
    size,
    align_corners,
    dtypes,
    members,
    layouts,
    loss,
    kind,
    weight,
    normalize,
    quantile,
    weighted,
    seed,
):
    student = laid_out(random_logits((batch, classes, *low), seed, 4.0, dtypes[0]), layouts[0])
    shape = (batch, classes, *(teacher_low or low))
    teachers = [
        laid_out(random_logits(shape, seed + 1 + i, 4.0, dtypes[1 + i % 2]), layouts[1 + i % 2])
        for i in range(members)
    ]
    score, valid = decided(teachers, size, align_corners, kind)
    threshold = threshold_near(score, quantile)
    extra = laid_out(random_logits(valid.shape, seed, 1.0).clamp(0, 2), layouts[2], class_dim=False)
    gradient = assert_consistency_is_the_reference(
        student,
        teachers,
        size,
        align_corners,
        loss=loss,
        confidence=kind,
        weight=weight,
        normalize=normalize,
        threshold=threshold,
        valid=laid_out(valid, layouts[2], class_dim=False) if not valid.all() else None,
        pixel_weight=extra if weighted else None,
    )
    active = valid.double()
    if weight in ("mask", "confidence"):
        active = active * (score >= threshold)
    if weighted:
        active = active * (extra != 0)
    taught = reached(active, student.shape, size, align_corners)
    assert not gradient.movedim(1, -1)[~taught].any()
    assert_confidence_is_the_reference(teachers, kind, size, align_corners)


CONSISTENCY = {  # what is drawn for any kernels, beside sizes, dtypes and layouts
    "align_corners": st.booleans(),
    "loss": st.sampled_from(LOSSES),
    "kind": st.sampled_from(KINDS),
    "weight": st.sampled_from(WEIGHTS),
    "normalize": st.sampled_from(NORMALIZATIONS),
    "quantile": st.sampled_from([0.0, 0.5, 0.9]),
    "weighted": st.booleans(),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=80)
@given(
    batch=st.integers(1, 3),
    classes=st.integers(2, 12) | st.integers(13, 70),
    low=st.tuples(SIDES, SIDES),
    teacher_low=st.none() | st.tuples(SIDES, SIDES),
    size=st.tuples(OUT, OUT),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    members=st.integers(1, 3),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    **CONSISTENCY,
)
def test_consistency_is_that_of_interpolated_logits(**case):
    assert_consistency_is_that_of_interpolated_logits(**case)


def assert_cross_entropy_is_the_reference(logits, labels, **options):
    logits = logits.detach().requires_grad_()
    loss = fastmt.cross_entropy(logits, labels, **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    truth = logits.detach().double().contiguous().requires_grad_()
    expected = reference.cross_entropy(truth, labels, **options)
    (expected_gradient,) = torch.autograd.grad(expected, truth)
    assert_loss_close(loss, expected, logits.dtype)
    assert_gradient_close(gradient, expected_gradient, logits.dtype, unit=1.0)
    taught = reached(labels != 255, logits.shape, labels.shape[1:], options["align_corners"])
    assert not gradient.movedim(1, -1)[~taught].any()


def assert_all_three_operations_are_the_reference(low, size, align_corners):
    student, teacher = (random_logits((2, 5, *low), seed, 4.0) for seed in (1, 2))
    score, valid = decided([teacher], size, align_corners, "max_prob")
    assert_consistency_is_the_reference(
        student, [teacher], size, align_corners, threshold=threshold_near(score, 0.5), valid=valid
    )
    assert_confidence_is_the_reference([teacher], "max_prob", size, align_corners)
    best = upsampled(teacher, size, align_corners).argmax(1)
    labels = torch.where(valid, best, 255).to(torch.uint8)
    assert_cross_entropy_is_the_reference(student, labels, align_corners=align_corners)


@pytest.mark.parametrize(("low", "size"), RATIOS)
@pytest.mark.parametrize("align_corners", [False, True])
def test_any_ratio_of_sizes_serves_all_three_operations(low, size, align_corners):
    assert_all_three_operations_are_the_reference(low, size, align_corners)


def assert_cross_entropy_is_that_of_interpolated_logits(
    batch,
    classes,
    low,
    size,
    align_corners,
    dtype,
    layouts,
    label_dtype,
    smoothing,
    normalize,
    weighted,
    seed,
):
    generator = torch.Generator().manual_seed(seed)
    logits = laid_out(random_logits((batch, classes, *low), seed, 4.0, dtype), layouts[0])
    labels = torch.randint(classes, (batch, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    assert_cross_entropy_is_the_reference(
        logits,
        laid_out(labels.to(label_dtype), layouts[1], class_dim=False),
        align_corners=align_corners,
        label_smoothing=smoothing,
        normalize=normalize,
        class_weight=0.1 + torch.rand(classes, generator=generator) if weighted else None,
        pixel_weight=torch.rand(labels.shape, generator=generator) if weighted else None,
    )


CROSS_ENTROPY = {
    "align_corners": st.booleans(),
    "label_dtype": st.sampled_from([torch.uint8, torch.int64]),
    "smoothing": st.sampled_from([0.0, 0.1]),
    "normalize": st.sampled_from(["all", "valid", "weight"]),
    "weighted": st.booleans(),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    classes=st.integers(1, 12) | st.integers(13, 70),
    low=st.tuples(SIDES, SIDES),
    size=st.tuples(OUT, OUT),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    **CROSS_ENTROPY,
)
def test_cross_entropy_is_that_of_interpolated_logits(**case):
    assert_cross_entropy_is_that_of_interpolated_logits(**case)


def test_a_label_out_of_range_is_named_also_when_logits_are_upsampled():
    labels = torch.zeros(2, 30, 40, dtype=torch.int64)
    labels[1, 29, 39] = 19
    with pytest.raises(ValueError, match="^labels: got label 19"):
        fastmt.cross_entropy(torch.zeros(2, 19, 8, 10), labels)


@pytest.mark.parametrize("operation", ["consistency", "cross_entropy"])
def test_nothing_to_learn_gives_zero_loss_and_gradient(operation):
    z = random_logits((2, 5, 4, 4), 0).requires_grad_()
    if operation == "consistency":
        value = fastmt.consistency_loss(z, random_logits((2, 5, 4, 4), 1), threshold=2, size=(9, 9))
    else:
        value = fastmt.cross_entropy(z, torch.full((2, 9, 9), 255))
    (gradient,) = torch.autograd.grad(value, z)
    assert value.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_backward_twice_gives_the_same_gradient_twice(loss):
    z = random_logits((2, 5, 4, 4), 0).requires_grad_()
    value = fastmt.consistency_loss(
        z, random_logits((2, 5, 4, 4), 1), loss=loss, weight="none", size=(9, 13)
    )
    first = torch.autograd.grad(value, z, retain_graph=True)[0].clone()
    assert first.any()
    assert torch.equal(first, torch.autograd.grad(value, z)[0])


@pytest.mark.parametrize("loss", ["mse", "ce", "js"])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("columns", [32, 70, 144, 300])
def test_a_walk_through_the_cells_goes_on_behind_what_is_left_out(rows, columns, loss):
    student, teacher = (random_logits((2, 7, 4, 19), seed, 4.0) for seed in (1, 2))
    size = (48, 19 * 16)
    y, x = torch.arange(size[0])[:, None], torch.arange(size[1])
    kept = (y // rows % 2 == 0) & (x // columns % 2 == 0) | (y // 3 % 4 == 3)
    valid = decided([teacher], size, False, "max_prob")[1] & kept
    assert_consistency_is_the_reference(
        student, [teacher], size, False, loss=loss, valid=valid, weight="none"
    )
    labels = torch.where(valid, upsampled(teacher, size, False).argmax(1), 255).to(torch.uint8)
    assert_cross_entropy_is_the_reference(student, labels, align_corners=False)


@pytest.mark.parametrize("scale", [0.1, 4.0, 30.0, 100.0, 1e4])
@pytest.mark.parametrize(
    ("low", "size"), [((5, 70), (40, 560)), ((3, 5), (96, 333)), ((2, 2), (64, 256))]
)
def test_logits_of_any_range_are_exact_all_through_wide_cells(low, size, scale):
    student, teacher = (random_logits((2, 7, *low), seed, scale) for seed in (1, 2))
    for loss in ("mse", "ce"):
        score, valid = decided([teacher], size, False, "margin")
        assert_consistency_is_the_reference(
            student,
            [teacher],
            size,
            False,
            loss=loss,
            valid=valid,
            confidence="margin",
            threshold=threshold_near(score, 0.3),
            temperature=1.0,
        )
    labels = torch.where(valid, upsampled(teacher, size, False).argmax(1), 255).to(torch.uint8)
    assert_cross_entropy_is_the_reference(student, labels, align_corners=False)


def test_one_class_that_rises_from_nothing_to_everything_within_a_cell_is_followed():
    student = torch.zeros(1, 3, 2, 40)
    student[:, 0, :, ::2], student[:, 1, :, 1::2] = 95.0, 95.0
    assert_consistency_is_the_reference(
        student, [student.flip(1)], (16, 320), False, weight="none", loss="ce"
    )
