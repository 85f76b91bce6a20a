"""Up-sampling inside the Triton kernels is interpolation before the dense operation, in float64."""

from __future__ import annotations

import pytest
import small
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import DTYPES, laid_out, random_logits, threshold_near
from test_upsampling import (
    assert_consistency_is_the_reference,
    assert_cross_entropy_is_the_reference,
    decided,
    reached,
    upsampled,
)
from tolerances import TOLERANCES

import fastmt
from fastmt.confidence import KINDS
from fastmt.consistency import LOSSES, NORMALIZATIONS, WEIGHTS
from fastmt.kernels import (
    calls,
    cells,
    cells_confidence,
    cells_consistency,
    cells_cross_entropy,
)
from fastmt.kernels.grid import first_beyond, neighbours

pytestmark = pytest.mark.usefixtures("kernels")

SIDE = st.integers(1, 5)
OUT = st.tuples(st.integers(1, 7), st.integers(1, 36))
RATIOS = [  # (low resolution, output): integer scales and not, wide strips, down-sampling
    ((3, 65), (3, 130)),
    ((9, 2), (72, 5)),
    ((5, 16), (9, 31)),
    ((3, 2), (4, 100)),
    ((8, 80), (5, 3)),
    ((1, 1), (3, 9)),
    ((4, 5), (4, 9)),
]


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


@settings(max_examples=14)
@given(
    batch=st.integers(1, 2),
    classes=st.integers(2, 12) | st.integers(13, 40),
    low=st.tuples(SIDE, SIDE),
    teacher_low=st.none() | st.tuples(SIDE, SIDE),
    size=OUT,
    align_corners=st.booleans(),
    dtypes=st.tuples(*[small.DTYPE] * 3),
    members=st.integers(1, 2),
    layouts=st.tuples(*[small.LAYOUT] * 3),
    loss=st.sampled_from(LOSSES),
    kind=st.sampled_from(KINDS),
    weight=st.sampled_from(WEIGHTS),
    normalize=st.sampled_from(NORMALIZATIONS),
    quantile=st.sampled_from([0.0, 0.5, 0.9]),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_consistency_is_that_of_interpolated_logits(
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


@settings(max_examples=15)
@given(
    batch=st.integers(1, 2),
    classes=st.integers(1, 12) | st.integers(13, 40),
    low=st.tuples(SIDE, SIDE),
    size=OUT,
    align_corners=st.booleans(),
    dtype=small.DTYPE,
    layouts=st.tuples(*[small.LAYOUT] * 2),
    label_dtype=st.sampled_from([torch.uint8, torch.int64]),
    smoothing=st.sampled_from([0.0, 0.1]),
    normalize=st.sampled_from(["all", "valid", "weight"]),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_cross_entropy_is_that_of_interpolated_logits(
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


@pytest.mark.parametrize(("low", "size"), RATIOS)
@pytest.mark.parametrize("align_corners", [False, True])
def test_any_ratio_of_sizes_serves_all_three_operations(low, size, align_corners):
    student, teacher = (random_logits((1, 5, *low), seed, 4.0) for seed in (1, 2))
    score, valid = decided([teacher], size, align_corners, "max_prob")
    assert_consistency_is_the_reference(
        student, [teacher], size, align_corners, threshold=threshold_near(score, 0.5), valid=valid
    )
    assert_confidence_is_the_reference([teacher], "max_prob", size, align_corners)
    best = upsampled(teacher, size, align_corners).argmax(1)
    labels = torch.where(valid, best, 255).to(torch.uint8)
    assert_cross_entropy_is_the_reference(student, labels, align_corners=align_corners)


@pytest.mark.parametrize("classes", [19, 21, 81, 150, 256])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_the_common_numbers_of_classes(classes, dtype):
    student, teacher = (random_logits((1, classes, 2, 3), seed, 4.0, dtype) for seed in (1, 2))
    size = (4, 20)
    for loss in ("mse", "bce"):
        assert_consistency_is_the_reference(
            student, [teacher], size, False, loss=loss, weight="none"
        )
    labels = upsampled(teacher, size, False).argmax(1)
    assert_cross_entropy_is_the_reference(student, labels, align_corners=False, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("classes", "loss", "size", "align_corners"),
    [(300, "bce", (3, 37), False), (1000, "mse", (4, 20), True), (4096, "kl", (2, 17), False)],
)
def test_more_classes_than_registers_hold_are_walked_in_pieces_of_a_strip(
    classes, loss, size, align_corners
):
    student, teacher = (random_logits((1, classes, 2, 3), seed, 4.0) for seed in (1, 2))
    strip = cells.strips_for(classes, cells.ROWS + calls.COLUMNS[loss])
    assert strip.piece < strip.pixels
    score, valid = decided([teacher], size, align_corners, "max_prob")
    assert_consistency_is_the_reference(
        student,
        [teacher],
        size,
        align_corners,
        loss=loss,
        threshold=threshold_near(score, 0.3),
        valid=valid,
    )
    assert_confidence_is_the_reference([teacher], "max_prob", size, align_corners)
    labels = upsampled(teacher, size, align_corners).argmax(1)
    labels[:, 0] = 255
    assert_cross_entropy_is_the_reference(
        student, labels, align_corners=align_corners, label_smoothing=0.1
    )


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_logits_of_any_range_are_exact_all_through_wide_cells(scale):
    student, teacher = (random_logits((1, 7, 2, 3), seed, scale) for seed in (1, 2))
    size = (8, 70)
    score, valid = decided([teacher], size, False, "margin")
    for loss in ("mse", "ce"):
        assert_consistency_is_the_reference(
            student,
            [teacher],
            size,
            False,
            loss=loss,
            valid=valid,
            confidence="margin",
            threshold=threshold_near(score, 0.3),
        )


def everything(student, teacher, labels, size):
    z = student.detach().requires_grad_()
    loss = fastmt.consistency_loss(z, teacher, threshold=0.5, size=size)
    supervised = fastmt.cross_entropy(z, labels)
    gradients = [torch.autograd.grad(value, z)[0] for value in (loss, supervised)]
    return [
        loss.detach(),
        supervised.detach(),
        *gradients,
        *fastmt.softmax_confidence(teacher, size=size),
    ]


def test_64_bit_offsets_and_repeated_calls_give_the_same_bits(monkeypatch):
    student, teacher = (random_logits((2, 5, 4, 7), seed, 4.0) for seed in (1, 2))
    labels = torch.randint(5, (2, 7, 50), generator=torch.Generator().manual_seed(0))
    first = everything(student, teacher, labels, (7, 50))
    again = everything(student, teacher, labels, (7, 50))
    monkeypatch.setattr(cells, "NARROW", 0)
    in_64_bits = small.offsets_of(
        monkeypatch, cells, cells_confidence, cells_consistency, cells_cross_entropy
    )
    wide = everything(student, teacher, labels, (7, 50))
    for a, b, c in zip(first, again, wide, strict=True):
        assert not a.isnan().any()
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert in_64_bits == [True] * 5  # two losses with their joins, and the confidence


@triton.jit
def band_kernel(found, bands, rows, out_height, BAND: tl.constexpr, WIDE: tl.constexpr):
    _, band, _ = cells.strip_of(1, bands, 16, WIDE)
    first = first_beyond(band + BAND, rows, out_height)
    tl.store(found, first)
    tl.store(found + 1, first_beyond(band + BAND + 1, rows, out_height) - first)
    tl.store(found + 2, neighbours(first, rows)[0])


def test_rows_whose_places_take_64_bits_are_found():
    low, high, band = 24_000, 48_000, 23_500
    walk = cells.walk_of(torch.empty(1, 2, low, 1), [], (high, 1), False, 16)
    assert walk.wide(2)
    found = small.left_by(band_kernel, 3, low, walk.first[0], high, BAND=band, WIDE=True)
    assert found == [2 * band + 1, 2, band]


def test_a_label_out_of_range_is_named_also_when_logits_are_upsampled():
    labels = torch.zeros(1, 6, 40, dtype=torch.int64)
    labels[0, 5, 39] = 19
    with pytest.raises(ValueError, match="^labels: got label 19"):
        fastmt.cross_entropy(torch.zeros(1, 19, 3, 10), labels)


@pytest.mark.parametrize("operation", ["consistency", "cross_entropy"])
def test_nothing_to_learn_gives_zero_loss_and_gradient(operation):
    z = random_logits((2, 5, 4, 4), 0).requires_grad_()
    if operation == "consistency":
        value = fastmt.consistency_loss(z, random_logits((2, 5, 4, 4), 1), threshold=2, size=(6, 6))
    else:
        value = fastmt.cross_entropy(z, torch.full((2, 6, 6), 255))
    (gradient,) = torch.autograd.grad(value, z)
    assert value.item() == 0
    assert not gradient.any()


def test_the_scratch_of_the_gradient_stays_at_low_resolution():
    logits = torch.empty(8, 19, 128, 128, device="meta")
    strip = cells.strips_for(19, 8)
    walk = cells.walk_of(logits, [logits], (1024, 1024), False, strip.pixels)
    full = 8 * 19 * 1024 * 1024
    assert walk.scratch(logits, strip).numel() < full / 16
