"""Up-sampled logits of one and three dimensions: the kernels take them as planes."""

from __future__ import annotations

import pytest
import torch
from operands import HALVES, LAYOUTS, laid_out, random_logits
from tolerances import assert_gradient_close, assert_loss_close

import fastmt
from fastmt import reference

pytestmark = pytest.mark.usefixtures("kernels")

SIZES = [
    ((9,), (40,)),
    ((2, 5, 3), (5, 15, 6)),
    ((6, 7, 8), (3, 7, 2)),
    ((3, 4, 5), (7, 4, 5)),
    ((2, 4, 5), (2, 9, 5)),
    ((1, 2, 1), (4, 6, 3)),
]


def inputs(low, size, dtype):
    shape = (2, 4, *low)
    student, *teachers = (random_logits(shape, seed, 3.0, dtype) for seed in range(3))
    labels = torch.randint(4, (2, *size), generator=torch.Generator().manual_seed(3))
    labels[0, 0] = 255
    return student.requires_grad_(), teachers, labels


def assert_same(loss, expected, student):
    (gradient,) = torch.autograd.grad(loss, student)
    (truth,) = torch.autograd.grad(expected, student)
    assert gradient.dtype == student.dtype
    assert_loss_close(loss, expected, student.dtype)
    assert_gradient_close(gradient, truth, student.dtype)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("low", "size", "dtype"),
    [
        *((low, size, torch.float32) for low, size in SIZES),
        *((*SIZES[place], dtype) for place in (1, 4) for dtype in HALVES),
    ],
)
def test_losses_and_gradients_are_those_of_the_reference(low, size, dtype, align_corners):
    student, teachers, labels = inputs(low, size, dtype)
    options = {"size": size, "align_corners": align_corners, "weight": "none", "loss": "kl"}
    loss = fastmt.consistency_loss(student, teachers, **options)
    assert_same(loss, reference.consistency_loss(student, teachers, **options), student)
    loss = fastmt.cross_entropy(student, labels, align_corners=align_corners)
    expected = reference.cross_entropy(student, labels, align_corners=align_corners)
    assert_same(loss, expected, student)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_of_the_output_and_statistics_are_those_of_the_reference(layout):
    low, size = SIZES[1]
    student, teachers, labels = inputs(low, size, torch.float32)
    moved = laid_out(student.detach(), layout).requires_grad_()
    weight = laid_out(torch.rand(labels.shape), layout, class_dim=False)
    options = {
        "size": size,
        "threshold": torch.tensor([0.4, 0.6, 0.8, 0.5]),
        "pixel_weight": weight,
        "valid": laid_out(labels != 1, layout, class_dim=False),
        "normalize": "selected",
        "return_stats": True,
    }
    loss, stats = fastmt.consistency_loss(moved, teachers, **options)
    expected, true_stats = reference.consistency_loss(moved, teachers, **options)
    assert_same(loss, expected, moved)
    torch.testing.assert_close(tuple(stats), tuple(true_stats))
    labels = laid_out(labels, layout, class_dim=False)
    loss = fastmt.cross_entropy(moved, labels, pixel_weight=weight, normalize="weight")
    expected = reference.cross_entropy(moved, labels, pixel_weight=weight, normalize="weight")
    assert_same(loss, expected, moved)


@pytest.mark.parametrize(("low", "size"), SIZES)
def test_confidence_is_that_of_the_reference(low, size):
    _, teachers, _ = inputs(low, size, torch.float32)
    score, label = fastmt.softmax_confidence(teachers, size=size)
    expected = reference.softmax_confidence(teachers, size=size)
    torch.testing.assert_close(score, expected.score)
    assert torch.equal(label, expected.label)


def test_a_teacher_of_the_output_size_goes_with_a_student_that_is_upsampled():
    low, size = SIZES[1]
    student, teachers, _ = inputs(low, size, torch.float32)
    teacher = reference.upsample(teachers[0], size, False)
    options = {"size": size, "threshold": 0.5}
    loss = fastmt.consistency_loss(student, teacher, **options)
    assert_same(loss, reference.consistency_loss(student, teacher, **options), student)


@pytest.mark.filterwarnings("error", "ignore:Conversion of an array")  # Triton 3.6's interpreter
def test_the_second_derivative_is_refused_by_name():
    student, teachers, _ = inputs(*SIZES[1], torch.float32)
    loss = fastmt.consistency_loss(student, teachers, size=SIZES[1][1], threshold=0.5)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative of a loss is not in the kernels"):
        torch.autograd.grad(gradient.square().sum(), student)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_several_grad_outputs_at_once_give_a_gradient_each():
    student, teachers, _ = inputs(*SIZES[1], torch.float32)
    loss = fastmt.consistency_loss(student, teachers, size=SIZES[1][1], threshold=0.5)
    factors = torch.tensor([1.0, -0.25])
    each = [torch.autograd.grad(loss, student, f, retain_graph=True)[0] for f in factors]
    (gradients,) = torch.autograd.grad(loss, student, factors, is_grads_batched=True)
    assert each[0].any()
    torch.testing.assert_close(gradients, torch.stack(each))


def test_an_empty_batch_of_volumes_has_a_loss_of_zero():
    student = torch.zeros(0, 4, 3, 4, 5, requires_grad=True)
    loss = fastmt.consistency_loss(student, student, size=(6, 8, 10))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == 0
    assert gradient.shape == student.shape
    score, _ = fastmt.softmax_confidence(student, size=(6, 8, 10))
    assert score.shape == (0, 6, 8, 10)


def test_a_volume_is_not_touched_by_what_its_slices_hold_that_have_no_weight():
    low, size = (3, 2, 2), (5, 4, 4)  # with corners aligned every other slice is one of the input
    student, _, labels = inputs(low, size, torch.float32)
    labels[:, [1, 2, 3, 4]] = 255
    with torch.no_grad():
        student[:, :, 1:] = torch.nan
    loss = fastmt.cross_entropy(student, labels, align_corners=True)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient[:, :, 0].isfinite().all()
    assert not gradient[:, :, 1:].any()
    score, _ = fastmt.softmax_confidence(student.detach(), size=size, align_corners=True)
    assert torch.equal(score.isnan()[0, :, 0, 0], torch.tensor([False, True, True, True, True]))
