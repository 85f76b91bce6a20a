"""What both losses promise for hard inputs, alike in the C++ kernels and in the reference."""

from __future__ import annotations

import pytest
import torch
from operands import DTYPES, random_logits
from torch import Tensor

import fastmt
from fastmt.confidence import KINDS
from fastmt.consistency import LOSSES, NORMALIZATIONS, WEIGHTS

pytestmark = pytest.mark.usefixtures("either")
SHAPE = (2, 5, 9, 11)
CE_NORMALIZATIONS = ("all", "valid", "weight")


def gradient_of(loss: Tensor, logits: Tensor, **options: object) -> Tensor:
    return torch.autograd.grad(loss, logits, **options)[0]


def student_logits(seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_logits(SHAPE, seed, dtype=dtype).requires_grad_()


def assert_nothing_is_taught(loss: Tensor, logits: Tensor) -> None:
    gradient = gradient_of(loss, logits)
    assert loss.item() == 0
    assert gradient.shape == logits.shape
    assert not gradient.any()
    assert not gradient.isnan().any()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("weight", ["mask", "confidence", "ratio"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_passing_pixel_gives_zero_loss_and_gradient(normalize, weight, dtype):
    student = student_logits(dtype=dtype)
    loss, stats = fastmt.consistency_loss(
        student,
        random_logits(SHAPE, 2),
        threshold=1.5,
        weight=weight,
        normalize=normalize,
        return_stats=True,
    )
    assert_nothing_is_taught(loss, student)
    assert stats.selected == 0
    assert 0 < stats.mean_score < 1


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_no_valid_pixel_gives_zero_loss_gradient_and_statistics(normalize, weight):
    student = student_logits()
    loss, stats = fastmt.consistency_loss(
        student,
        random_logits(SHAPE, 2),
        threshold=0.0,
        valid=torch.zeros(2, 9, 11, dtype=torch.bool),
        weight=weight,
        normalize=normalize,
        return_stats=True,
    )
    assert_nothing_is_taught(loss, student)
    assert stats.selected == stats.mean_score == 0


@pytest.mark.parametrize("normalize", CE_NORMALIZATIONS)
def test_no_labelled_pixel_gives_zero_cross_entropy(normalize):
    logits = student_logits()
    labels = torch.full((2, 9, 11), 255)
    assert_nothing_is_taught(fastmt.cross_entropy(logits, labels, normalize=normalize), logits)


def test_labels_of_classes_without_weight_give_zero_cross_entropy_beside_a_nan():
    logits = student_logits()
    with torch.no_grad():
        logits[0, 0, 0] = torch.nan
    labels, weight = torch.zeros(2, 9, 11, dtype=torch.uint8), torch.tensor([0.0, 1, 1, 1, 1])
    loss = fastmt.cross_entropy(logits, labels, class_weight=weight, normalize="weight")
    assert_nothing_is_taught(loss, logits)


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 4, 4), (2, 5, 0, 4)])
def test_an_empty_batch_gives_zero_loss_and_an_empty_gradient(shape):
    out = (shape[0], *shape[2:])
    for normalize in NORMALIZATIONS:
        student = torch.zeros(shape, requires_grad=True)
        loss, stats = fastmt.consistency_loss(
            student, torch.zeros(shape), normalize=normalize, weight="ratio", return_stats=True
        )
        assert_nothing_is_taught(loss, student)
        assert stats.selected == stats.mean_score == 0
    for normalize in CE_NORMALIZATIONS:
        labels = torch.zeros(out, dtype=torch.uint8)
        loss = fastmt.cross_entropy(student, labels, normalize=normalize)
        assert_nothing_is_taught(loss, student)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("by", ["valid", "pixel_weight", "threshold"])
def test_masked_pixels_get_exactly_zero_gradient_whatever_the_student_holds(loss, poison, by):
    teacher = random_logits(SHAPE, 2, 5.0)
    score = fastmt.softmax_confidence(teacher).score
    masked = score < 0.9
    options = {
        "valid": {"valid": ~masked, "weight": "none"},
        "pixel_weight": {"pixel_weight": (~masked).float(), "weight": "none"},
        "threshold": {"threshold": 0.9},
    }[by]
    clean = student_logits()
    dirty = torch.where(masked.unsqueeze(1), poison, clean.detach()).requires_grad_()
    values = [fastmt.consistency_loss(z, teacher, loss=loss, **options) for z in (clean, dirty)]
    gradients = [gradient_of(value, z) for value, z in zip(values, (clean, dirty), strict=True)]
    assert 0 < masked.sum() < masked.numel()
    assert torch.equal(*values)
    assert torch.equal(*gradients)
    assert not gradients[1].movedim(1, -1)[masked].any()
    assert gradients[1].movedim(1, -1)[~masked].any(-1).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("by", ["label", "pixel_weight"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_pixels_get_exactly_zero_gradient_whatever_the_logits_hold(poison, by, smoothing):
    clean = student_logits()
    ignored = torch.arange(198).view(2, 9, 11) % 3 == 0
    dirty = torch.where(ignored.unsqueeze(1), poison, clean.detach()).requires_grad_()
    labels = torch.where(ignored, 255 if by == "label" else 0, 1)
    weight = None if by == "label" else (~ignored).float()
    values = [
        fastmt.cross_entropy(z, labels, pixel_weight=weight, label_smoothing=smoothing)
        for z in (clean, dirty)
    ]
    gradients = [gradient_of(value, z) for value, z in zip(values, (clean, dirty), strict=True)]
    assert torch.equal(*values)
    assert torch.equal(*gradients)
    assert not gradients[1].movedim(1, -1)[ignored].any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("size", [(9, 11), (18, 22)])
@pytest.mark.parametrize("normalize", CE_NORMALIZATIONS)
def test_pixels_whose_class_has_no_weight_leave_no_trace_of_their_logits(poison, size, normalize):
    clean = student_logits()
    dirty = clean.detach().clone()
    dirty[..., 6:] = poison
    labels = torch.ones(2, *size, dtype=torch.uint8)
    labels[..., size[1] // 2 :] = 3  # wherever the up-sampled logits see column 6
    pixel_weight = torch.where(labels == 3, torch.inf, 2.0)
    options = {"class_weight": torch.tensor([1.0, 2, 1, 0, 1]), "normalize": normalize}
    for weight in (None, pixel_weight):
        values, gradients = [], []
        for logits in (clean, dirty.requires_grad_()):
            loss = fastmt.cross_entropy(logits, labels, pixel_weight=weight, **options)
            values.append(loss)
            gradients.append(gradient_of(loss, logits))
        assert 0 < values[0] < torch.inf
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)
        assert not gradients[1][..., 6:].any()


@pytest.mark.parametrize("size", [(9, 11), (18, 22)])
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_smoothing_gives_a_pixel_the_weights_of_all_classes(size, smoothing):
    logits, labels = student_logits(), torch.zeros(2, *size, dtype=torch.uint8)
    with torch.no_grad():
        logits[0, 1, 2, 3] = torch.nan
    for weight, is_nan in ((torch.tensor([0.0, 0, 0, 1, 0]), True), (torch.zeros(5), False)):
        options = {"class_weight": weight, "label_smoothing": smoothing}
        loss = fastmt.cross_entropy(logits, labels, **options)
        assert loss.isnan() == is_nan
        assert gradient_of(loss, logits).isnan().any() == is_nan
    assert_nothing_is_taught(fastmt.cross_entropy(logits, labels, **options), logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("strict", [False, True])
def test_a_nan_score_never_passes(kind, members, strict):
    teacher = random_logits(SHAPE, 2)
    teacher[0, :, :4] = torch.nan
    teacher[1, 3, 5] = torch.nan
    student = student_logits()
    loss, stats = fastmt.consistency_loss(
        student,
        [teacher] * members,
        confidence=kind,
        threshold=-1.0,
        strict=strict,
        return_stats=True,
    )
    gradient = gradient_of(loss, student)
    assert loss.isfinite()
    assert stats.selected == pytest.approx((198 - 4 * 11 - 11) / 198)
    assert not gradient[0, :, :4].any()
    assert not gradient[1, :, 5].any()
    assert gradient[1, :, 4].all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("function", [fastmt.consistency_loss, fastmt.reference.consistency_loss])
def test_nothing_selected_is_zero_also_beside_a_nan_teacher(loss, function):
    teacher, student = random_logits(SHAPE, 2), student_logits()
    teacher[0, 1, 2, 3] = torch.nan
    options = {"loss": loss, "threshold": 1.1, "weight": "none", "normalize": "selected"}
    value = function(student, teacher, **options)
    assert value == 0
    assert not gradient_of(value, student).any()


@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16])
def test_a_loss_is_float32_whatever_the_type_of_its_pixels_weights(weights):
    student, pixel_weight = student_logits(), torch.rand(SHAPE[0], *SHAPE[2:]).to(weights)
    labels = torch.zeros(pixel_weight.shape, dtype=torch.uint8)
    losses = (
        fastmt.consistency_loss(student, random_logits(SHAPE, 2), pixel_weight=pixel_weight),
        fastmt.cross_entropy(student, labels, pixel_weight=pixel_weight),
    )
    assert [loss.dtype for loss in losses] == [torch.float32] * 2


@pytest.mark.parametrize("threshold", [0.5, torch.tensor(0.5), torch.tensor([0.5, 0.9])])
@pytest.mark.parametrize("size", [None, (8, 8)])
def test_only_strict_refuses_a_score_on_the_threshold(threshold, size):
    teacher = torch.zeros(2, 2, 4, 4)
    student = random_logits(teacher.shape, 1)
    for strict, share in ((False, 1), (True, 0)):
        loss, stats = fastmt.consistency_loss(
            student, teacher, threshold=threshold, strict=strict, size=size, return_stats=True
        )
        assert stats.selected == share
        assert bool(loss) == bool(share)
