"""How the losses behave under autograd, and what they leave untouched."""

from __future__ import annotations

import weakref

import pytest
import torch
from operands import DTYPES, random_logits
from tolerances import assert_gradient_close

import fastmt
from fastmt.consistency import LOSSES

pytestmark = pytest.mark.usefixtures("either")
SHAPE = (2, 5, 9, 11)
LABELS = torch.arange(198).view(2, 9, 11) % 5
OPERATIONS = {
    "consistency": lambda z: fastmt.consistency_loss(z, random_logits(SHAPE, 2), threshold=0.5),
    "ratio": lambda z: fastmt.consistency_loss(
        z, random_logits(SHAPE, 2), loss="ce", weight="ratio", normalize="valid"
    ),
    "cross_entropy": lambda z: fastmt.cross_entropy(z, LABELS, label_smoothing=0.1),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


def logits(dtype=torch.float32, seed=1):
    return random_logits(SHAPE, seed, dtype=dtype).requires_grad_()


@each_operation
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_twice_gives_the_same_gradient_twice(operation, dtype):
    z = logits(dtype)
    value = operation(z)
    first = torch.autograd.grad(value, z, retain_graph=True)[0].clone()
    second = torch.autograd.grad(value, z, retain_graph=True)[0]
    third = torch.autograd.grad(value, z)[0]
    assert first.any()
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@pytest.mark.parametrize("modified", ["teacher", "threshold", "pixel_weight", "valid", "labels"])
def test_a_repeated_backward_never_takes_what_was_modified_since(modified, either):
    tensors = {
        "teacher": random_logits(SHAPE, 2),
        "threshold": torch.tensor(0.5),
        "pixel_weight": torch.full((2, 9, 11), 0.5),
        "valid": torch.ones(2, 9, 11, dtype=torch.bool),
        "labels": LABELS.clone(),
    }
    labels, z = tensors["labels"], logits()
    options = {name: tensors[name] for name in ("threshold", "pixel_weight", "valid")}
    value = fastmt.consistency_loss(z, tensors["teacher"], **options)
    value = value + fastmt.cross_entropy(z, labels, pixel_weight=tensors["pixel_weight"])
    (first,) = torch.autograd.grad(value, z, retain_graph=True)
    first = first.clone()
    tensors[modified].zero_()
    try:
        (second,) = torch.autograd.grad(value, z)
    except RuntimeError as error:
        assert "modified" in str(error)
    else:
        assert either == "eager"
        assert torch.equal(first, second)


@pytest.mark.parametrize("keep", ["teacher", "labels"])
def test_a_loss_that_is_kept_after_its_backward_pass_keeps_no_tensor_alive(keep):
    tensors = {"teacher": random_logits(SHAPE, 2), "labels": LABELS.clone()}
    z, alive = logits(), weakref.ref(tensors[keep])
    value = fastmt.consistency_loss(z, tensors["teacher"], threshold=0.5)
    value = value + fastmt.cross_entropy(z, tensors["labels"])
    value.backward(retain_graph=True)
    value.backward()
    assert alive() is not None
    tensors.clear()
    assert alive() is None


@each_operation
def test_accumulation_into_grad_does_not_reach_the_next_backward(operation):
    z = logits()
    value = operation(z)
    value.backward(retain_graph=True)
    once = z.grad.clone()
    z.grad.mul_(-7)
    z.grad = None
    value.backward(retain_graph=True)
    assert torch.equal(z.grad, once)
    value.backward()
    assert torch.equal(z.grad, 2 * once)


@each_operation
def test_the_gradient_is_linear_in_grad_output(operation):
    z = logits()
    (gradient,) = torch.autograd.grad(operation(z), z)
    for factor in (3.0, -0.25, 0.0):
        (scaled,) = torch.autograd.grad(operation(z), z, torch.tensor(factor))
        assert_gradient_close(scaled, factor * gradient.double(), torch.float32)


@each_operation
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_grad_outputs_at_once_give_a_gradient_each(operation, dtype):
    z, factors = logits(dtype), torch.tensor([1.0, -0.25, 0.0])
    value = operation(z)
    each = [torch.autograd.grad(value, z, f, retain_graph=True)[0].clone() for f in factors]

    def at_once(factors, **options):
        return torch.autograd.grad(value, z, factors, retain_graph=True, **options)[0]

    for gradients in (at_once(factors, is_grads_batched=True), torch.vmap(at_once)(factors)):
        assert gradients.dtype == dtype
        assert each[0].any()
        torch.testing.assert_close(gradients, torch.stack(each))


@each_operation
def test_a_grad_output_that_negates_its_memory_is_read_with_its_sign(operation):
    z, factor = logits(), torch.tensor(3.0)
    (expected,) = torch.autograd.grad(operation(z), z, factor)
    negated = torch._neg_view(-factor)  # as is the imaginary part of a conjugate
    (gradient,) = torch.autograd.grad(operation(z), z, negated)
    assert torch.equal(gradient, expected)


@each_operation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_scale_keeps_half_precision_gradients_from_vanishing(operation, dtype):
    z = logits(dtype)
    (gradient,) = torch.autograd.grad(operation(z) * 65536, z)
    truth = z.detach().double().requires_grad_()
    with fastmt.backend("eager"):
        (expected,) = torch.autograd.grad(operation(truth) * 65536, truth)
    assert gradient.isfinite().all()
    assert_gradient_close(gradient, expected, dtype)


@pytest.mark.parametrize("operation", [fastmt.consistency_loss, fastmt.cross_entropy])
@pytest.mark.parametrize("normalize", ["all", "valid", "weight"])
@pytest.mark.parametrize("size", [(9, 11), (18, 22)])
@pytest.mark.parametrize("unit", [2.0**-30, 2.0**30])
def test_the_unit_of_pixel_weights_keeps_float16_gradients_as_they_are(
    operation, normalize, size, unit
):
    weights, gradients = torch.rand(2, *size, generator=torch.Generator().manual_seed(3)), []
    weights[0, 0, :3] = torch.tensor([0.0, 1.0, -0.5])
    options = {"normalize": normalize}
    if operation is fastmt.consistency_loss:
        target = random_logits((2, 5, *size), 2)
        options |= {"size": size, "weight": "none"}
    else:
        target = torch.arange(2 * size[0] * size[1]).view(2, *size) % 5
    for factor in (1.0, unit):
        z = logits(torch.float16)
        value = operation(z, target, pixel_weight=weights * factor, **options)
        scale = 1 if normalize == "weight" else 1 / factor
        gradients.append(torch.autograd.grad(value * scale, z)[0])
    assert gradients[0].any()
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("normalize", ["all", "valid", "weight"])
@pytest.mark.parametrize("size", [(9, 11), (18, 22)])
@pytest.mark.parametrize("unit", [2.0**-30, 2.0**30])
@pytest.mark.parametrize("with_pixels", [False, True])
def test_the_unit_of_class_weights_keeps_float16_gradients_as_they_are(
    normalize, size, unit, with_pixels
):
    labels, gradients = torch.arange(2 * size[0] * size[1]).view(2, *size) % 5, []
    weights = torch.tensor([1.0, 0.3, 0.0, 0.8, 0.05])
    options = {"normalize": normalize, "label_smoothing": 0.1}
    if with_pixels:
        options["pixel_weight"] = torch.rand(2, *size, generator=torch.Generator().manual_seed(3))
    for factor in (1.0, unit):
        z = logits(torch.float16)
        value = fastmt.cross_entropy(z, labels, class_weight=weights * factor, **options)
        scale = 1 if normalize == "weight" else 1 / factor
        gradients.append(torch.autograd.grad(value * scale, z)[0])
    assert gradients[0].any()
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)


def test_a_zero_grad_output_gives_zero_gradient():
    z = logits()
    value, _ = fastmt.consistency_loss(z, random_logits(SHAPE, 2), return_stats=True)
    (gradient,) = torch.autograd.grad(value * 0, z)
    assert not gradient.any()


@each_operation
def test_a_second_derivative_is_a_clear_error(operation, either):
    if either == "eager":
        pytest.skip("the reference is differentiable twice")
    z = logits()
    value = operation(z)
    with pytest.raises(RuntimeError, match="twice|second derivative"):
        (gradient,) = torch.autograd.grad(value, z, create_graph=True)
        (value + gradient.square().sum()).backward()


def test_the_teacher_never_receives_a_gradient():
    teachers = [random_logits(SHAPE, seed).requires_grad_() for seed in (2, 3)]
    z = logits()
    value = fastmt.consistency_loss(z, [t * 2 for t in teachers], threshold=0.1)
    value.backward()
    assert z.grad.any()
    assert all(teacher.grad is None for teacher in teachers)
    frozen = fastmt.consistency_loss(z.detach(), teachers[0], threshold=0.1)
    assert not frozen.requires_grad


def test_a_student_that_is_its_own_teacher_gets_the_students_gradient_only():
    z = logits()
    value = fastmt.consistency_loss(z, z, loss="soft_ce", weight="none")
    (gradient,) = torch.autograd.grad(value, z)
    assert gradient.abs().max() < 1e-8


def test_statistics_carry_no_gradient():
    value, stats = fastmt.consistency_loss(
        logits(), random_logits(SHAPE, 2), return_stats=True, threshold=0.5
    )
    assert value.requires_grad
    assert not stats.selected.requires_grad
    assert not stats.mean_score.requires_grad


@each_operation
def test_no_gradient_is_recorded_where_none_is_wanted(operation):
    recorded = operation(logits())
    with torch.no_grad():
        assert not operation(logits()).requires_grad
        assert torch.equal(operation(logits()), recorded)
    with torch.inference_mode():
        assert torch.equal(operation(logits().detach()), recorded)


def test_a_teacher_made_in_inference_mode_is_accepted():
    with torch.inference_mode():
        teacher = random_logits(SHAPE, 2)
    z = logits()
    (gradient,) = torch.autograd.grad(fastmt.consistency_loss(z, teacher, weight="none"), z)
    assert gradient.any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_callers_tensors_are_never_written(loss, dtype):
    tensors = {
        "student": random_logits(SHAPE, 1, dtype=dtype),
        "teacher": random_logits(SHAPE, 2, dtype=dtype),
        "other": random_logits(SHAPE, 3, dtype=dtype),
        "threshold": torch.full((5,), 0.3),
        "pixel_weight": torch.rand(2, 9, 11),
        "valid": torch.rand(2, 9, 11) > 0.2,
        "labels": LABELS.clone(),
        "class_weight": torch.rand(5),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    versions = {name: tensor._version for name, tensor in tensors.items()}
    z = tensors["student"].requires_grad_()
    options = {name: tensors[name] for name in ("threshold", "pixel_weight", "valid")}
    value = fastmt.consistency_loss(z, [tensors["teacher"], tensors["other"]], loss=loss, **options)
    value = value + fastmt.cross_entropy(
        z, tensors["labels"], class_weight=tensors["class_weight"], label_smoothing=0.1
    )
    scale = torch.tensor(3.0)
    value.backward(scale, retain_graph=True)
    value.backward(scale)
    fastmt.softmax_confidence([tensors["teacher"], tensors["other"]])
    assert scale == 3
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name
        assert tensor._version == versions[name], name


@each_operation
def test_autocast_leaves_logits_as_they_come_and_the_loss_in_float32(operation):
    network = torch.nn.Conv2d(3, 5, 1)
    with torch.autocast("cpu", torch.bfloat16):
        z = network(torch.ones(2, 3, 9, 11))
        z.retain_grad()
        value = operation(z)
    value.backward()
    assert z.dtype == z.grad.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    assert torch.equal(value, operation(z))
    assert network.weight.grad.any()
