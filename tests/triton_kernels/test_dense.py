"""What the dense Triton kernels do that those of C++ do not: wide offsets, sums in two steps."""

from __future__ import annotations

import pytest
import small
import torch
import triton
import triton.language as tl
from operands import DTYPES, LAYOUTS, laid_out, random_logits
from test_cross_entropy import random_labels

import fastmt
from fastmt import kernels, reference
from fastmt.cross_entropy import NORMALIZATIONS
from fastmt.kernels import (
    columns,
    denominator,
    dense_confidence,
    dense_consistency,
    dense_cross_entropy,
    launch,
    sums,
    views,
)

pytestmark = pytest.mark.usefixtures("kernels")
interpreted = pytest.mark.skipif(not kernels.INTERPRETED, reason="tensors are moved to a GPU first")


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
def test_64_bit_offsets_give_the_same_pixels_in_every_layout(layout, dtype, monkeypatch):
    shape = (2, 19, 5, 31)
    student, teacher = (
        laid_out(random_logits(shape, seed, dtype=dtype), layout) for seed in (1, 2)
    )
    labels = laid_out(random_labels(shape, 0, torch.uint8), layout, class_dim=False)
    expected = everything(student, teacher, labels)
    monkeypatch.setattr(views, "NARROW", 0)
    in_64_bits = small.offsets_of(
        monkeypatch, dense_confidence, dense_consistency, dense_cross_entropy
    )
    assert_same(expected, everything(student, teacher, labels))
    assert in_64_bits
    assert all(in_64_bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("classes", "side"), [(3, 16), (19, 16), (81, 8), (150, 8)])
def test_full_blocks_give_what_the_reference_does(classes, side, dtype):
    shape = (2, classes, side, side)
    student, teacher = (random_logits(shape, seed, dtype=dtype) for seed in (1, 2))
    labels = random_labels(shape, 0, torch.uint8)
    assert views.describe(
        [student], [], columns.blocks_for(classes, dtype.itemsize, 2).pixels
    ).whole
    scalars, pixels = everything(student, teacher, labels)
    with fastmt.backend("eager"):
        expected, expected_pixels = everything(student, teacher, labels)
    torch.testing.assert_close(scalars, expected, rtol=1e-5, atol=1e-6)
    for own, right in zip(pixels, expected_pixels, strict=True):
        torch.testing.assert_close(own, right, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_sums_of_many_programs_are_taken_in_two_steps(monkeypatch):
    shape = (1, 3, 1025)
    student, teacher = (random_logits(shape, seed) for seed in (1, 2))
    labels = random_labels(shape, 0)
    expected = everything(student, teacher, labels)
    monkeypatch.setattr(sums, "FEW", 2)
    monkeypatch.setattr(sums, "SHARE", 2)  # programs that each of several adds up
    launch.forget()
    assert_same(expected, everything(student, teacher, labels))
    labels[0, 2], labels[0, 1000] = 9, 7
    with pytest.raises(ValueError, match="^labels: got label 9"):
        fastmt.cross_entropy(student, labels)


def unwritten_sums(*call, **options):
    """NaN, with which other tests begin, has a count of 0 in its lower half in float64."""
    return sums.partial_sums(*call, **options).fill_(1 / 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("by_class", [False, True], ids="class weights {}".format)
@pytest.mark.parametrize("normalize", ["all", "valid", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_large_gradient_is_written_with_its_denominator(
    monkeypatch, smoothing, by_class, normalize, dtype
):
    monkeypatch.setattr(denominator, "LAUNCHES", -(2**40))  # any gradient is large
    monkeypatch.setattr(denominator, "PIXELS", 32)
    monkeypatch.setattr(denominator, "partial_sums", unwritten_sums)
    monkeypatch.setattr(sums, "FEW", 2)
    monkeypatch.setattr(sums, "SHARE", 2)  # programs that each of several adds up
    launch.forget()
    shape = (2, 5, 9, 7)
    logits, labels = random_logits(shape, 0, dtype=dtype), random_labels(shape, 1)
    labels[0, :4] = 255
    weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0))
    weight = weight.where(weight > 0.2, 0)
    class_weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0]) if by_class else None
    options = [255, NORMALIZATIONS.index(normalize)]
    loss, scale, gradient, _ = kernels.cross_entropy(
        logits, labels, weight, class_weight, options, smoothing, False, True
    )
    assert (scale == 1) == (dtype == torch.float32)
    truth = logits.double().requires_grad_()
    expected = reference.cross_entropy(
        truth,
        labels,
        ignore_index=255,
        pixel_weight=weight.double(),
        class_weight=class_weight if class_weight is None else class_weight.double(),
        label_smoothing=smoothing,
        normalize=normalize,
    )
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
    relative = 2e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(
        scale.double() * gradient.double(), truth.grad, rtol=relative, atol=1e-7
    )


@interpreted
def test_a_denominator_is_of_labels_that_lie_beyond_32_bits(monkeypatch):
    monkeypatch.setattr(denominator, "LAUNCHES", -(2**40))
    launch.forget()
    torch.utils.deterministic.fill_uninitialized_memory = False  # the fixture puts it back
    logits, labels = random_logits((1, 4, 3), 0), torch.tensor([[2, 255, 1]], dtype=torch.uint8)
    memory = torch.empty(2 * 3 * 2**29 + 1, dtype=torch.uint8)
    far = memory.as_strided(labels.shape, (1, 3 * 2**29)).copy_(labels)
    values = [fastmt.cross_entropy(logits.requires_grad_(), each) for each in (labels, far)]
    assert torch.equal(*values)


def test_huge_weights_of_a_large_gradient_divide_the_loss_and_it_alike(monkeypatch):
    monkeypatch.setattr(denominator, "LAUNCHES", -(2**40))
    launch.forget()
    logits, labels = random_logits((2, 3, 80, 80), 0), random_labels((2, 3, 80, 80), 1)
    weight = torch.full(labels.shape, 2e35)  # the sum of a block is beyond float32
    options = {"normalize": "weight"}
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    huge = fastmt.cross_entropy(leaves[0], labels, pixel_weight=weight, **options)
    plain = fastmt.cross_entropy(leaves[1], labels, **options)
    (huge + plain).backward()
    torch.testing.assert_close(huge, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(*[leaf.grad for leaf in leaves], rtol=1e-5, atol=1e-9)


def test_nothing_valid_has_no_gradient_also_where_the_denominator_comes_first(monkeypatch):
    monkeypatch.setattr(denominator, "LAUNCHES", -(2**40))
    launch.forget()
    logits = random_logits((1, 3, 5), 0).requires_grad_()
    loss = fastmt.cross_entropy(logits, torch.full((1, 5), 255))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_weights_that_cancel_out_have_no_gradient_also_where_the_denominator_comes_first(
    monkeypatch,
):
    monkeypatch.setattr(denominator, "LAUNCHES", -(2**40))
    launch.forget()
    logits = random_logits((1, 3, 5), 0)
    logits[0, 0, 0] = torch.nan
    weight = torch.tensor([[1.0, -1.0, 0.0, 0.0, 0.0]])
    options = {"pixel_weight": weight, "normalize": "weight"}
    loss = fastmt.cross_entropy(logits.requires_grad_(), torch.zeros(1, 5).long(), **options)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_a_wrong_label_is_read_as_no_class_and_poisons_loss_and_gradient():
    labels = torch.tensor([[0, 20_000_000_000, -1, 2, 255]])
    logits = random_logits((1, 3, 5), 0)
    loss, scale, gradient, wrong = kernels.cross_entropy(
        logits, labels, None, torch.ones(3), [255, 1], 0.0, False, True
    )
    assert loss.isnan()
    assert scale.isnan()
    assert gradient.isfinite().all()
    assert wrong == 2


def gradient_of(function, logits):
    z = logits.clone().requires_grad_()
    value = function(z)
    return value.detach(), torch.autograd.grad(value, z)[0]


@pytest.mark.parametrize("by_class", [False, True], ids="class weights {}".format)
def test_an_infinite_weight_of_a_pixel_is_nan_only_where_nothing_is_times_it(by_class):
    logits, labels = torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1), torch.ones(1, 1, dtype=torch.long)
    weights = {"pixel_weight": torch.full((1, 1), torch.inf)}
    weights |= {"class_weight": torch.ones(3)} if by_class else {}
    loss, gradient = gradient_of(lambda z: fastmt.cross_entropy(z, labels, **weights), logits)
    assert loss.isinf()
    assert torch.equal(gradient[0, [0, 2], 0], torch.full((2,), torch.inf))


@pytest.mark.parametrize("loss", ["kl", "soft_ce"])
def test_a_loss_near_the_largest_number_is_no_infinity(loss):
    student, teacher = torch.tensor([0.0, -3e38, -3e38]).view(1, 3, 1), torch.zeros(1, 3, 1)
    options = {"loss": loss, "weight": "none"}
    value, _ = gradient_of(lambda z: fastmt.consistency_loss(z, teacher, **options), student)
    torch.testing.assert_close(value, torch.tensor(2e38))


@triton.jit
def blocks_kernel(found, size, BLOCK: tl.constexpr):
    tl.store(found, views.blocks_in(size, BLOCK))


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 2**31 - 1, 2**31, 2**31 + 4097])
def test_blocks_are_counted_also_where_the_last_one_reaches_beyond_32_bits(size):
    assert small.left_by(blocks_kernel, 1, size, BLOCK=4096) == [-(-size // 4096)]
