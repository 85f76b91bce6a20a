"""The confidence kernel against the float64 reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operands import DTYPES, LAYOUTS, random_logits, shapes, teachers, without_ties
from tolerances import TOLERANCES

import fastmt
from fastmt import reference
from fastmt.confidence import KINDS

pytestmark = pytest.mark.usefixtures("kernels")


def assert_confidence_is_the_reference(members, **options):
    score, label = fastmt.softmax_confidence(members, **options)
    expected = reference.softmax_confidence([m.double() for m in members], **options)
    assert score.dtype == torch.float32
    assert label.dtype == torch.int64
    assert score.is_contiguous()
    assert torch.equal(label, expected.label)
    error = (score.double() - expected.score).abs().max().item() if score.numel() else 0
    assert error <= TOLERANCES[torch.float32].score
    assert ((score >= 0) & (score <= 1 + 1e-6)).all()


@given(
    shape=shapes(st.integers(1, 200)),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    layout=st.sampled_from(LAYOUTS),
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_score_and_label_are_those_of_the_reference(
    shape, dtypes, layout, kind, temperature, scale, seed
):
    members = teachers(shape, dtypes, layout, scale, temperature, seed)
    assert_confidence_is_the_reference(members, kind=kind, temperature=temperature)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 2, 3, 31, 32, 33, 1000, 4096])
def test_any_number_of_classes(kind, classes):
    members = without_ties([random_logits((2, classes, 5, 7), 0, 3.0)])
    assert_confidence_is_the_reference(members, kind=kind)


@pytest.mark.parametrize("pixels", [1, 7, 15, 16, 17, 31, 33, 255, 256, 257, 4095, 4097])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_pixels(kind, pixels):
    members = without_ties([random_logits((1, 3, pixels), pixels)])
    assert_confidence_is_the_reference(members, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stride_0_teacher(kind):
    (values,) = without_ties([random_logits((1, 19, 6, 5), 0)])
    assert_confidence_is_the_reference([values.expand(3, 19, 6, 5)], kind=kind)
    assert_confidence_is_the_reference([values[..., :1].expand(1, 19, 6, 40)], kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
def test_shifted_and_far_apart_logits(kind, dtype, offset):
    logits = (random_logits((200, 6), 0, 2.0) + offset).to(dtype)
    logits[::7, 2] += offset
    logits[::5, 3] -= offset
    assert_confidence_is_the_reference(without_ties([logits]), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_pattern_of_half_precision_is_read_exactly(kind):
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        every = every[every.isfinite() & (every.float().abs() < 1e30)]
        assert_confidence_is_the_reference([torch.stack([every, every.flip(0)], 1)], kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", [0, 1, 4])
def test_a_nan_logit_makes_its_score_nan_and_no_other(kind, position, either):
    logits = random_logits((50, 5), 0)
    logits[7, position] = torch.nan
    for members in ([logits], [logits, random_logits((50, 5), 1)]):
        score, label = fastmt.softmax_confidence(members, kind=kind)
        assert score.isnan().nonzero().flatten().tolist() == [7]
        assert ((label >= 0) & (label < 5)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_logits_propagate_as_in_eager(kind, value):
    logits = random_logits((50, 5), 0)
    logits[3, 2] = value
    logits[9] = value
    score, _ = fastmt.softmax_confidence(logits, kind=kind)
    expected = reference.softmax_confidence(logits.double(), kind=kind).score
    torch.testing.assert_close(score.double(), expected, rtol=0, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_are_not_confident_and_take_the_first_label(kind, either):
    score, label = fastmt.softmax_confidence(torch.full((3, 8, 40), 5.0), kind=kind)
    expected = {"max_prob": 1 / 8, "entropy": 0.0, "margin": 0.0}[kind]
    torch.testing.assert_close(score, torch.full((3, 40), expected), rtol=0, atol=1e-6)
    assert (score >= 0).all()
    assert not label.any()


@pytest.mark.parametrize("size", [None, (8, 24)])
def test_of_several_equal_classes_the_first_is_the_label(size, either):
    teacher = torch.full((1, 21, 2, 3), -20.0)  # Triton's tiles have 16, 4 and 1 class
    teacher[:, [3, 9, 17, 20]] = 5.0
    shares = {"max_prob": 1 / 4, "entropy": 1 - math.log(4) / math.log(21), "margin": 0.0}
    for (kind, share), members in itertools.product(shares.items(), (1, 2)):
        score, label = fastmt.softmax_confidence([teacher] * members, kind=kind, size=size)
        assert (label == 3).all()
        torch.testing.assert_close(score, torch.full_like(score, share), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_no_pixels_give_empty_maps(shape, either):
    score, label = fastmt.softmax_confidence(torch.zeros(shape))
    assert score.shape == label.shape == (shape[0], *shape[2:])


def test_confidence_carries_no_gradient(either):
    logits = random_logits((2, 3, 4), 0).requires_grad_()
    score, label = fastmt.softmax_confidence(logits)
    assert not score.requires_grad
    assert not label.requires_grad


def test_an_exported_network_takes_a_size_that_follows_its_input():
    class Confident(torch.nn.Module):
        def forward(self, logits):
            size = (4 * logits.shape[2], 4 * logits.shape[3])
            return fastmt.softmax_confidence(logits, size=size)

    sides = {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    with fastmt.backend("auto"):
        exported = torch.export.export(
            Confident(), (random_logits((2, 5, 6, 7), 1),), dynamic_shapes={"logits": sides}
        )
    logits = random_logits((2, 5, 9, 8), 2)
    score, label = exported.module()(logits)
    expected = fastmt.softmax_confidence(logits, size=(36, 32))
    torch.testing.assert_close(score, expected.score)
    assert torch.equal(label, expected.label)
