"""Up-sampling at its edges: borders, certain teachers, logits not finite, other heights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operands import random_logits

import fastmt
from fastmt import reference
from fastmt.confidence import KINDS
from fastmt.consistency import LOSSES

pytestmark = pytest.mark.usefixtures("kernels")

TOLERANCE = 1e-6  # of a score


def interpolated(tensor, size):
    return F.interpolate(tensor, size, mode="bilinear")


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [(1, 20), (0, 0), (3, 39), (2, 38), (1, 1)])
def test_a_logit_that_is_not_finite_poisons_the_pixels_it_reaches_and_no_other(poison, at):
    teacher, weight = random_logits((1, 5, 4, 40), 0), torch.zeros(1, 1, 4, 40)
    clean = fastmt.softmax_confidence(teacher, size=(16, 160))
    teacher[0, 2, at[0], at[1]], weight[0, 0, at[0], at[1]] = poison, 1
    reached = interpolated(weight, (16, 160)).squeeze(1) > 0
    score, label = fastmt.softmax_confidence(teacher, size=(16, 160))
    assert torch.equal(score.isnan(), reached & (poison != -torch.inf))
    torch.testing.assert_close(score[~reached], clean.score[~reached])
    assert torch.equal(label[~reached], clean.label[~reached])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["mse", "ce", "kl"])
@pytest.mark.parametrize("low", [(4, 12), (2, 6)])
def test_a_class_that_is_excluded_everywhere_has_probability_zero(kind, loss, low):
    student = random_logits((1, 4, 4, 12), 0)
    teacher = random_logits((1, 4, *low), 1)
    options = {"loss": loss, "size": (32, 96), "weight": "none"}
    expected = fastmt.consistency_loss(student[:, :3], teacher[:, :3], **options)
    student[:, 3] = teacher[:, 3] = -torch.inf
    value = fastmt.consistency_loss(student, teacher, **options)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for members in (teacher, [student, teacher]):
        score = fastmt.softmax_confidence(members, kind=kind, size=(32, 96)).score
        assert score.isfinite().all()


@pytest.mark.parametrize("peak", [1e3, 1e4, 1e6])
def test_a_border_knows_nothing_of_large_logits_that_do_not_reach_it(peak):
    last_column, last_but_one_row = torch.randn(2, 1, 3, 8, 8)
    last_column[:, 0, :, -1] = peak
    last_but_one_row[:, 0, -2] = peak
    left, bottom = (..., slice(4)), (..., slice(-4, None), slice(None))
    for teacher, border in ((last_column, left), (last_but_one_row, bottom)):
        score = fastmt.softmax_confidence(teacher, size=(64, 64)).score
        expected = reference.softmax_confidence(teacher.double(), size=(64, 64)).score
        torch.testing.assert_close(score[border].double(), expected[border], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 2, 19])
@pytest.mark.parametrize("members", [1, 3, 10, 11, 12, 14])
@pytest.mark.parametrize("size", [None, (24, 40)])
def test_a_certain_teacher_scores_exactly_one(kind, classes, members, size):
    teacher = torch.full((1, classes, 3, 5), -200.0)
    teacher[:, 0] = 7.25
    score, label = fastmt.softmax_confidence([teacher] * members, kind=kind, size=size)
    assert (score == 1).all()
    assert not label.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_one_class_alone_teaches_exactly_nothing(loss):
    student, teacher = (random_logits((1, 1, 3, 5), seed).requires_grad_() for seed in (0, 1))
    value = fastmt.consistency_loss(student, teacher.detach(), loss=loss, size=(24, 40))
    assert value == 0
    assert not torch.autograd.grad(value, student)[0].any()


def test_a_student_and_a_teacher_of_nearly_the_same_logits_stay_certain_while_walked():
    teacher = torch.zeros(1, 19, 4, 8)
    teacher[:, 3] = 40.0 + torch.rand(4, 8)
    loss, stats = fastmt.consistency_loss(
        teacher.flip(1), teacher, threshold=1.0, size=(32, 64), return_stats=True
    )
    assert stats.selected == 1
    assert loss.isfinite()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("size", [None, (8, 24)])
def test_the_label_of_a_pixel_that_is_nan_is_that_of_the_reference(poison, members, kind, at, size):
    teacher = random_logits((1, 5, 2, 6), 0)
    teacher[0, at] = poison
    score, label = fastmt.softmax_confidence([teacher] * members, kind=kind, size=size)
    expected = reference.softmax_confidence([teacher.double()] * members, kind=kind, size=size)
    assert score.isnan().all()
    assert torch.equal(label, expected.label)


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_a_large_pixel_weight_leaves_a_wide_range_of_logits_finite(loss):
    student = torch.zeros(1, 3, 4, 8)
    student[:, 0, :, ::2] = 78.0
    student.requires_grad_()
    weight = torch.full((1, 32, 64), 1e6)
    value = fastmt.consistency_loss(
        student,
        student.detach().flip(1),
        loss=loss,
        weight="none",
        size=(32, 64),
        pixel_weight=weight,
        normalize="weight",
    )
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_the_gradients_of_one_cell_add_up_within_the_range_of_float16():
    logits = torch.zeros(1, 2, 1, 1, dtype=torch.float16, requires_grad=True)
    labels, weight = torch.zeros(1, 16, 16, dtype=torch.uint8), torch.full((1, 16, 16), 1e3)
    losses = [fastmt.cross_entropy(logits, labels, pixel_weight=weight)]
    teacher = torch.tensor([[200.0, 0.0]]).view(1, 2, 1, 1)
    options = {"loss": "ce", "weight": "none", "pixel_weight": weight}
    losses.append(fastmt.consistency_loss(logits, teacher, size=(16, 16), **options))
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.flatten().tolist() == [-500, 500]


@pytest.mark.parametrize("heights", [(64, 16), (64, 63), (16, 64), (64, 64)])
def test_neither_loss_nor_gradient_depends_on_how_groups_fall_to_threads(heights):
    high, low = heights
    student = random_logits((2, 19, high, 32), 0, 3.0).requires_grad_()
    teacher = random_logits((2, 19, low, 32), 1, 3.0)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 3, 2, 2):
            torch.set_num_threads(count)
            loss = fastmt.consistency_loss(student, teacher, threshold=0.5, size=(256, 128))
            results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    finally:
        torch.set_num_threads(threads)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize(("at", "classes"), [((0, 0), 19), ((1, 2), 7), ((2, 3), 7), ((1, 4), 19)])
@pytest.mark.parametrize("poison", [torch.nan, -torch.inf, 1e30])
@pytest.mark.parametrize(("size", "align_corners"), [((6, 20), False), ((5, 9), True)])
def test_a_logit_leaves_no_trace_where_it_has_no_weight(size, align_corners, classes, poison, at):
    student, teacher = (random_logits((1, classes, 3, 5), seed, 4.0) for seed in (1, 2))
    poisoned, mark = [student.clone(), teacher.clone()], torch.zeros(1, 1, 3, 5)
    poisoned[0][0, 1, at[0], at[1]] = poisoned[1][0, 2, at[0], at[1]] = poison
    mark[0, 0, at[0], at[1]] = 1
    untouched = reference.upsample(mark, size, align_corners)[:, 0] == 0
    labels = torch.where(untouched, 0, 255)

    def everything(student, teacher):
        z = student.requires_grad_()
        options = {"align_corners": align_corners, "normalize": "valid"}
        masked = {**options, "weight": "none", "valid": untouched, "size": size}
        losses = [fastmt.consistency_loss(z, teacher, **masked)]
        losses.append(fastmt.cross_entropy(z, labels, **options))
        return [*losses, *(torch.autograd.grad(loss, z)[0] for loss in losses)]

    results = zip(everything(*poisoned), everything(student, teacher), strict=True)
    for result, clean in results:
        torch.testing.assert_close(result, clean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize(
    ("low", "high", "align_corners", "output", "at"), [(7, 25, False, 12, 3), (15, 51, True, 25, 7)]
)
def test_an_output_pixel_that_falls_on_a_logit_knows_nothing_of_the_next_one(
    axis, low, high, align_corners, output, at
):
    shape, size = [1, 3, 2, 2], [2, 2]
    shape[axis], size[axis - 2] = low, high
    logits = random_logits(shape, 1, 3.0)
    poisoned = logits.index_fill(axis, torch.tensor([at - 1, at + 1]), torch.nan)
    options = {"size": size, "align_corners": align_corners}
    scores, seen = (fastmt.softmax_confidence(z, **options).score for z in (logits, poisoned))
    torch.testing.assert_close(
        seen.select(axis - 1, output), scores.select(axis - 1, output), rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_nan_in_either_network_makes_loss_and_gradient_of_its_pixel_nan(which, loss):
    operands = [random_logits((1, 7, 2, 4), seed) for seed in (1, 2)]
    operands[which][0, 0, 0, 0] = torch.nan
    student, teacher = operands[0].requires_grad_(), operands[1]
    value = fastmt.consistency_loss(student, teacher, loss=loss, weight="none", size=(4, 8))
    (gradient,) = torch.autograd.grad(value, student)
    if loss == "ce" and which == 1:  # which takes no more than a label from the teacher
        assert value.isfinite()
    else:
        assert value.isnan()
        assert gradient[0, :, 0, 0].isnan().all()
    assert gradient[..., 2].isfinite().all()
