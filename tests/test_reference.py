"""The reference is the definition: its gradients, PyTorch's own operations, and closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from operands import random_logits, threshold_near
from torch.overrides import TorchFunctionMode

from fastmt import reference
from fastmt.confidence import KINDS
from fastmt.consistency import CLASS_REDUCTIONS, LOSSES, NORMALIZATIONS, WEIGHTS

F64 = torch.float64


def pair(shape=(2, 4, 3, 2), scale=2.0):
    return random_logits(shape, 1, scale, F64), random_logits(shape, 2, scale, F64)


def gradients_agree(function, logits):
    return torch.autograd.gradcheck(function, logits.clone().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_gradient_of_consistency_is_the_difference_quotient(loss, weight):
    student, teacher = pair()
    members = [teacher, random_logits(teacher.shape, 3, 2.0, F64)]
    settings = itertools.product(NORMALIZATIONS, CLASS_REDUCTIONS)
    for i, (normalize, class_reduction) in enumerate(settings):
        kind, ensemble = KINDS[i % 3], members[: 1 + i % 2]
        score = reference.softmax_confidence(ensemble, kind=kind, temperature=0.7).score

        def value(
            z, normalize=normalize, reduction=class_reduction, kind=kind, q=ensemble, s=score
        ):
            return reference.consistency_loss(
                z,
                q,
                loss=loss,
                weight=weight,
                normalize=normalize,
                class_reduction=reduction,
                confidence=kind,
                temperature=0.7,
                threshold=threshold_near(s, 0.4),
                pixel_weight=torch.linspace(0, 2, 12, dtype=F64).view(2, 3, 2),
                valid=torch.arange(12).view(2, 3, 2) % 5 > 0,
            )

        assert gradients_agree(value, student)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("spatial", "size"), [((3,), (8,)), ((3, 2), (7, 5)), ((2, 2, 3), (3, 3, 5))]
)
def test_gradient_passes_through_upsampling(spatial, size, align_corners):
    student, teacher = pair((1, 3, *spatial))
    labels = torch.arange(math.prod(size)).view(1, *size) % 3
    options = {"align_corners": align_corners}
    assert gradients_agree(
        lambda z: reference.consistency_loss(z, teacher, threshold=0.5, size=size, **options),
        student,
    )
    assert gradients_agree(lambda z: reference.cross_entropy(z, labels, **options), student)


@pytest.mark.parametrize("normalize", ["all", "valid", "weight"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_gradient_of_cross_entropy_is_the_difference_quotient(normalize, smoothing):
    logits, _ = pair()
    labels = torch.tensor([0, 1, 2, 3, 255, 0, 255, 3, 2, 1, 1, 0]).view(2, 3, 2)
    assert gradients_agree(
        lambda z: reference.cross_entropy(
            z,
            labels,
            normalize=normalize,
            label_smoothing=smoothing,
            class_weight=torch.tensor([0.5, 1.0, 0.0, 2.0], dtype=F64),
            pixel_weight=torch.linspace(0, 2, 12, dtype=F64).view(2, 3, 2),
        ),
        logits,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_cross_entropy_is_that_of_pytorch(smoothing, weighted, dtype):
    logits, _ = pair((2, 4, 5, 3))
    labels = torch.randint(4, (2, 5, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    labels[0, :2] = 255
    weight = torch.tensor([0.5, 1.0, 0.1, 2.0], dtype=F64) if weighted else None
    expected = F.cross_entropy(
        logits, labels.long(), weight, ignore_index=255, label_smoothing=smoothing
    )
    value = reference.cross_entropy(
        logits, labels, class_weight=weight, label_smoothing=smoothing, normalize="weight"
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("align_corners", [False, True])
def test_upsampling_is_interpolate_before_the_dense_operation(align_corners):
    student, teacher = pair((2, 4, 5, 3))
    size, options = (13, 9), {"loss": "js", "threshold": 0.5, "normalize": "selected"}
    big = [
        F.interpolate(z, size, mode="bilinear", align_corners=align_corners)
        for z in (student, teacher)
    ]
    value = reference.consistency_loss(
        student, teacher, size=size, align_corners=align_corners, **options
    )
    assert value == reference.consistency_loss(*big, **options)
    score, label = reference.softmax_confidence(teacher, size=size, align_corners=align_corners)
    assert torch.equal(score, big[1].softmax(1).amax(1))
    assert torch.equal(label, big[1].argmax(1))


def plain(loss, p, q):
    """Each loss as its formula is printed, for probabilities without zeros."""
    middle = (p + q) / 2
    return {
        "mse": ((p - q) ** 2).sum(1),
        "kl": (q * (q / p).log()).sum(1),
        "soft_ce": -(q * p.log()).sum(1),
        "ce": -p.log().gather(1, q.argmax(1, keepdim=True)).squeeze(1),
        "bce": F.binary_cross_entropy(p, q, reduction="none").sum(1),
        "js": ((p * (p / middle).log()).sum(1) + (q * (q / middle).log()).sum(1)) / 2,
    }[loss]


@pytest.mark.parametrize("loss", LOSSES)
def test_pixel_loss_is_the_printed_formula(loss):
    student, teacher = pair()
    p, q = student.softmax(1), (teacher / 0.5).softmax(1)
    value = reference.consistency_loss(student, teacher, loss=loss, weight="none", temperature=0.5)
    torch.testing.assert_close(value, plain(loss, p, q).mean(), rtol=1e-10, atol=0)


def test_kl_is_that_of_pytorch():
    student, teacher = pair((6, 5))
    expected = F.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
    value = reference.consistency_loss(student, teacher, loss="kl", weight="none")
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss not in ("soft_ce", "ce", "bce")])
def test_divergence_of_equal_networks_is_zero_with_zero_gradient(loss):
    logits = random_logits((3, 5, 4), 0, dtype=F64).requires_grad_()
    value = reference.consistency_loss(logits, logits.detach(), loss=loss, weight="none")
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.abs() < 1e-15
    assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_weights_and_denominators_are_as_documented(weight, normalize):
    student, teacher = pair((1, 3, 40))
    valid, extra = torch.arange(40).view(1, 40) % 3 > 0, torch.linspace(0, 2, 40, dtype=F64)[None]
    score = teacher.softmax(1).amax(1)
    limit = threshold_near(score, 0.5)
    passes = valid & (score >= limit)
    pixel = {
        "mask": passes.double(),
        "confidence": passes * score,
        "ratio": valid * passes.sum().double() / valid.sum(),
        "none": valid.double(),
    }[weight] * extra
    total = (pixel * plain("mse", student.softmax(1), teacher.softmax(1))).sum()
    count = {"all": 40, "valid": valid.sum(), "selected": passes.sum(), "weight": pixel.sum()}
    value, stats = reference.consistency_loss(
        student,
        teacher,
        weight=weight,
        normalize=normalize,
        threshold=limit,
        valid=valid,
        pixel_weight=extra,
        return_stats=True,
    )
    torch.testing.assert_close(value, total / count[normalize], rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.selected.double(), passes.sum() / valid.sum().double())
    torch.testing.assert_close(stats.mean_score.double(), score[valid].mean())


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_the_fraction_that_passes_has_the_precision_of_the_scores(default):
    student, teacher = pair((1, 4, 41, 49))
    score = reference.softmax_confidence(teacher).score
    options = {"threshold": threshold_near(score, 0.4), "return_stats": True}
    fraction = (score >= options["threshold"]).double().mean()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        value, stats = reference.consistency_loss(student, teacher, weight="ratio", **options)
        all_pixels, _ = reference.consistency_loss(student, teacher, weight="none", **options)
    finally:
        torch.set_default_dtype(before)
    assert value.item() == pytest.approx((fraction * all_pixels).item(), rel=1e-14)
    assert stats.selected == fraction.float()


def test_scores_of_known_distributions():
    q = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]], dtype=F64)
    entropy = (0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(3)
    expected = {"max_prob": [0.5, 1 / 3], "margin": [0.25, 0.0], "entropy": [1 - entropy, 0.0]}
    for kind in KINDS:
        score, label = reference.softmax_confidence(q.log(), kind=kind)
        torch.testing.assert_close(score, torch.tensor(expected[kind], dtype=F64))
        assert label[0] == 0


def test_an_ensemble_averages_probabilities_not_logits():
    members = [torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.3, 0.7]]).log()]
    score, label = reference.softmax_confidence(members)
    torch.testing.assert_close(score, torch.tensor([0.55]))
    assert label.item() == 0


def test_a_threshold_by_class_is_indexed_by_the_teachers_label():
    teacher = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    limits = torch.tensor([0.5, 0.95])
    _, stats = reference.consistency_loss(
        teacher, teacher, threshold=limits, weight="mask", return_stats=True
    )
    assert stats.selected == 0.5


def test_no_number_is_copied_to_a_device_which_would_wait_for_it():
    class NoCopy(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            assert function not in (torch.as_tensor, torch.tensor), function
            return function(*args, **(kwargs or {}))

    student, teacher = random_logits((2, 3, 4), 1), random_logits((2, 3, 4), 2)
    with NoCopy():
        reference.consistency_loss(student, teacher, threshold=0.5)
        reference.cross_entropy(student, torch.zeros(2, 4, dtype=torch.int64))
        reference.ema_update_([student], [teacher], 0.9)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_decay_averages_the_same_as_a_number_and_as_a_tensor(dtype, decay):
    value = random_logits((5, 7), 1).T
    averages = []
    for given in (decay, torch.tensor(decay, dtype=torch.float64)):
        averages.append(random_logits((7, 5), 2, dtype=dtype))
        reference.ema_update_(averages[-1:], [value], given)
    assert torch.equal(*averages)


def test_a_threshold_is_compared_in_the_precision_of_the_scores():
    student, _ = pair((1, 10, 3, 2))
    uniform = torch.zeros_like(student)
    assert reference.softmax_confidence(uniform).score.eq(0.1).all()
    for strict, share in ((False, 1), (True, 0)):
        options = {"threshold": 0.1, "strict": strict, "return_stats": True}
        _, stats = reference.consistency_loss(student, uniform, **options)
        assert stats.selected == share
