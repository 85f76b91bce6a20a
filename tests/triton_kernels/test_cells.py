"""Up-sampling inside the Triton kernels is interpolation before the dense operation, in float64."""

from __future__ import annotations

import pytest
import small
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import DTYPES, random_logits, threshold_near
from test_upsampling import (  # noqa: F401, one is run here on these kernels too
    CONSISTENCY,
    CROSS_ENTROPY,
    assert_all_three_operations_are_the_reference,
    assert_confidence_is_the_reference,
    assert_consistency_is_that_of_interpolated_logits,
    assert_consistency_is_the_reference,
    assert_cross_entropy_is_that_of_interpolated_logits,
    assert_cross_entropy_is_the_reference,
    decided,
    test_a_label_out_of_range_is_named_also_when_logits_are_upsampled,
    upsampled,
)

import fastmt
from fastmt.kernels import (
    calls,
    cells,
    cells_confidence,
    cells_consistency,
    cells_cross_entropy,
    launch,
    sums,
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


@settings(max_examples=14)
@given(
    batch=st.integers(1, 2),
    classes=st.integers(2, 12) | st.integers(13, 40),
    low=st.tuples(SIDE, SIDE),
    teacher_low=st.none() | st.tuples(SIDE, SIDE),
    size=OUT,
    dtypes=st.tuples(*[small.DTYPE] * 3),
    members=st.integers(1, 2),
    layouts=st.tuples(*[small.LAYOUT] * 3),
    **CONSISTENCY,
)
def test_consistency_is_that_of_interpolated_logits(**case):
    assert_consistency_is_that_of_interpolated_logits(**case)


@settings(max_examples=15)
@given(
    batch=st.integers(1, 2),
    classes=st.integers(1, 12) | st.integers(13, 40),
    low=st.tuples(SIDE, SIDE),
    size=OUT,
    dtype=small.DTYPE,
    layouts=st.tuples(*[small.LAYOUT] * 2),
    **CROSS_ENTROPY,
)
def test_cross_entropy_is_that_of_interpolated_logits(**case):
    assert_cross_entropy_is_that_of_interpolated_logits(**case)


@pytest.mark.parametrize(("low", "size"), RATIOS)
@pytest.mark.parametrize("align_corners", [False, True])
def test_any_ratio_of_sizes_serves_all_three_operations(low, size, align_corners):
    assert_all_three_operations_are_the_reference(low, size, align_corners)


@pytest.mark.parametrize(
    "options",
    [
        {"class_reduction": "mean"},
        {"temperature": 0.5},
        {"loss": "bce", "class_reduction": "mean", "temperature": 2.0, "normalize": "weight"},
        {"loss": "soft_ce", "temperature": 0.5, "normalize": "selected"},
    ],
    ids=str,
)
@pytest.mark.parametrize("classes", [5, 19])
def test_what_scales_logits_and_losses_does_so_where_they_are_upsampled(classes, options):
    student, teacher = (random_logits((2, classes, 3, 4), seed, 3.0) for seed in (1, 2))
    size, temperature = (7, 19), options.get("temperature", 1.0)
    assert_consistency_is_the_reference(
        student, [teacher], size, False, weight="confidence", threshold=0.0, **options
    )
    for kind in ("max_prob", "entropy", "margin"):
        confidence = fastmt.softmax_confidence(
            teacher, kind=kind, temperature=temperature, size=size
        )
        score, _ = decided([teacher / temperature], size, False, kind)
        torch.testing.assert_close(confidence.score.double(), score, rtol=0, atol=2e-6)


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


def test_sums_of_many_programs_are_those_of_one(monkeypatch):
    student, teacher = (random_logits((2, 3, 5, 6), seed) for seed in (1, 2))
    labels = torch.arange(2 * 17 * 70).view(2, 17, 70) % 3

    def everything():
        z = student.clone().requires_grad_()
        loss, stats = fastmt.consistency_loss(
            z, teacher, threshold=0.4, size=(17, 70), normalize="weight", return_stats=True
        )
        supervised = fastmt.cross_entropy(z, labels)
        (gradient,) = torch.autograd.grad(loss + supervised, z)
        return torch.stack([loss.detach(), *stats, supervised.detach()]), gradient

    expected = everything()
    monkeypatch.setattr(sums, "FEW", 2)
    monkeypatch.setattr(sums, "SHARE", 2)
    launch.forget()
    for own, other in zip(everything(), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-8)
