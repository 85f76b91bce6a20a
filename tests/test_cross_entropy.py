"""The cross-entropy kernel against the float64 reference, and its labels."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import DTYPES, LAYOUTS, laid_out, random_logits, shapes
from tolerances import assert_gradient_close, assert_loss_close

import fastmt
from fastmt import reference
from fastmt.cross_entropy import NORMALIZATIONS

pytestmark = pytest.mark.usefixtures("poisoned")


def random_labels(shape, seed, dtype=torch.int64, ignored=0.2, ignore_index=255):
    generator = torch.Generator().manual_seed(seed)
    out = (shape[0], *shape[2:])
    classes = min(shape[1], 255) if dtype == torch.uint8 else shape[1]
    labels = torch.randint(classes, out, generator=generator)
    labels[torch.rand(out, generator=generator) < ignored] = ignore_index
    return labels.to(dtype)


def assert_cross_entropy_is_the_reference(logits, labels, **options):
    logits = logits.detach().requires_grad_()
    loss = fastmt.cross_entropy(logits, labels, **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    truth = logits.detach().double().contiguous().requires_grad_()
    for name in ("pixel_weight", "class_weight"):
        if options.get(name) is not None:
            options[name] = options[name].double()
    expected = reference.cross_entropy(truth, labels, **options)
    (expected_gradient,) = torch.autograd.grad(expected, truth)
    assert loss.dtype == torch.float32
    assert gradient.dtype == logits.dtype
    assert_loss_close(loss, expected, logits.dtype)
    assert_gradient_close(gradient, expected_gradient, logits.dtype)
    ignored = labels == options.get("ignore_index", 255)
    assert not gradient.movedim(1, -1)[ignored].any()


@pytest.mark.usefixtures("kernels")
@settings(max_examples=80)
@given(
    shape=shapes(st.integers(1, 40) | st.integers(41, 200)),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    label_dtype=st.sampled_from([torch.uint8, torch.int64]),
    normalize=st.sampled_from(NORMALIZATIONS),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    weights=st.tuples(*[st.sampled_from([None, torch.float32, torch.float16])] * 2),
    scale=st.sampled_from([0.3, 3.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradient_are_those_of_the_reference(
    shape, dtype, layouts, label_dtype, normalize, smoothing, weights, scale, seed
):
    logits = laid_out(random_logits(shape, seed, scale, dtype), layouts[0])
    labels = laid_out(random_labels(shape, seed + 1, label_dtype), layouts[1], class_dim=False)
    generator = torch.Generator().manual_seed(seed)
    by_pixel = torch.rand(labels.shape, generator=generator)
    by_pixel = laid_out(torch.where(by_pixel < 0.2, 0, by_pixel), layouts[2], class_dim=False)
    by_class = 0.1 + torch.rand(shape[1], generator=generator)
    assert_cross_entropy_is_the_reference(
        logits,
        labels,
        normalize=normalize,
        label_smoothing=smoothing,
        pixel_weight=None if weights[0] is None else by_pixel.to(weights[0]),
        class_weight=None if weights[1] is None else by_class.to(weights[1]),
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("classes", [1, 2, 31, 33, 1000, 4096])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_any_number_of_classes(classes, smoothing):
    shape = (2, classes, 5, 7)
    labels = random_labels(shape, 0, ignore_index=-100)
    assert_cross_entropy_is_the_reference(
        random_logits(shape, 1), labels, label_smoothing=smoothing, ignore_index=-100
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [30.0, 1e3, 1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_far_apart_and_shifted_logits(dtype, scale, smoothing):
    shape = (2, 6, 5, 9)
    logits = (random_logits(shape, 1, scale) + 100).to(dtype)
    labels = random_labels(shape, 0)
    assert_cross_entropy_is_the_reference(logits, labels, label_smoothing=smoothing)


@pytest.mark.usefixtures("kernels")
def test_class_weights_that_are_a_strided_view():
    shape = (2, 19, 40)
    weight = torch.rand(38, generator=torch.Generator().manual_seed(0))[::2]
    assert_cross_entropy_is_the_reference(
        random_logits(shape, 1), random_labels(shape, 0), class_weight=weight
    )


@pytest.mark.usefixtures("kernels")
def test_it_is_the_cross_entropy_of_pytorch():
    shape = (2, 19, 13, 17)
    logits, labels = random_logits(shape, 1), random_labels(shape, 0)
    weight = torch.rand(19, generator=torch.Generator().manual_seed(0))
    value = fastmt.cross_entropy(
        logits, labels, class_weight=weight, normalize="weight", label_smoothing=0.1
    )
    expected = F.cross_entropy(logits, labels, weight, ignore_index=255, label_smoothing=0.1)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("align_corners", [False, True])
def test_logits_are_upsampled_to_the_labels(align_corners):
    logits = random_logits((2, 5, 6, 7), 0).requires_grad_()
    labels = random_labels((2, 5, 24, 27), 1)
    value = fastmt.cross_entropy(logits, labels, align_corners=align_corners)
    (gradient,) = torch.autograd.grad(value, logits)
    truth = logits.detach().double().requires_grad_()
    big = F.interpolate(truth, (24, 27), mode="bilinear", align_corners=align_corners)
    expected = F.cross_entropy(big, labels, ignore_index=255)
    (expected_gradient,) = torch.autograd.grad(expected, truth)
    assert_loss_close(value, expected, torch.float32)
    assert_gradient_close(gradient, expected_gradient, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "label"),
    [
        (torch.uint8, 19),
        (torch.uint8, 254),
        (torch.int64, 19),
        (torch.int64, 20_000_000_000),
        (torch.int64, -1),
    ],
)
def test_a_label_out_of_range_is_named(either, dtype, label):
    labels = torch.zeros(2, 30, 40, dtype=dtype)
    labels[1, 7, 8:10] = torch.tensor([255, label])
    with pytest.raises(ValueError, match=rf"^labels: got label {label}, expected 0\.\.18 or"):
        fastmt.cross_entropy(torch.zeros(2, 19, 30, 40), labels)


def test_a_wrong_label_is_an_error_also_where_the_pixel_has_no_weight(either):
    labels = torch.tensor([[0, 7]])
    with pytest.raises(ValueError, match="^labels: got label 7"):
        fastmt.cross_entropy(torch.zeros(1, 3, 2), labels, pixel_weight=torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("classes", [257, 300, 1000])
def test_uint8_labels_serve_more_than_256_classes(either, classes):
    logits = random_logits((1, classes, 4), 0)
    labels = torch.tensor([[0, 44, 254, 255]], dtype=torch.uint8)
    expected = F.cross_entropy(logits, labels.long(), ignore_index=255)
    torch.testing.assert_close(fastmt.cross_entropy(logits, labels), expected)


@pytest.mark.parametrize("ignore_index", [-1, 300, -100])
def test_an_ignore_index_that_uint8_cannot_hold_ignores_nothing(either, ignore_index):
    labels = torch.tensor([[0, 255]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="^labels: got label 255"):
        fastmt.cross_entropy(torch.zeros(1, 19, 2), labels, ignore_index=ignore_index)
    labels = torch.tensor([[0, 44]], dtype=torch.uint8)
    logits = random_logits((1, 60, 2), 0)
    value = fastmt.cross_entropy(logits, labels, ignore_index=ignore_index)
    torch.testing.assert_close(value, F.cross_entropy(logits, labels.long()))


def test_a_label_in_range_can_be_the_ignored_one(either):
    logits = random_logits((3, 4), 0)
    labels = torch.tensor([0, 2, 0])
    value = fastmt.cross_entropy(logits, labels, ignore_index=0)
    torch.testing.assert_close(value, F.cross_entropy(logits[1:2], labels[1:2]))


def test_labels_on_a_gpu_are_read_where_it_is_asked_for(monkeypatch):
    module, there = importlib.import_module("fastmt.cross_entropy"), SimpleNamespace(is_cpu=False)
    monkeypatch.delenv("FASTMT_CHECK", raising=False)
    assert not module._checks_labels(there)
    for value, checks in (("0", False), ("1", True)):
        monkeypatch.setenv("FASTMT_CHECK", value)
        assert module._checks_labels(there) == checks


def test_labels_that_a_kernel_has_counted_are_named(monkeypatch):
    """As those of a GPU: what the kernel returns says that there are some, no more."""
    module, labels = importlib.import_module("fastmt.cross_entropy"), torch.tensor([[3, 9, 255]])
    monkeypatch.setattr(module, "_checks_labels", lambda of_the_call: True)
    module._refuse(torch.tensor(0.0), labels, 5, 255)
    with pytest.raises(ValueError, match=r"^labels: got label 9, expected 0\.\.4 or"):
        module._refuse(torch.tensor(1.0), labels, 5, 255)
