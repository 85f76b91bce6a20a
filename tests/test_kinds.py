"""Arguments of the kinds that were checked before are not checked again, and no others."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from operands import random_logits

import fastmt
from fastmt import backends, cpp_backend
from fastmt.kinds import kinds_of

LOGITS, LABELS = random_logits((2, 5, 6, 7), 1), torch.zeros(2, 6, 7, dtype=torch.uint8)
CALLS = {
    "cross_entropy": lambda z: fastmt.cross_entropy(z, LABELS),
    "consistency_loss": lambda z: fastmt.consistency_loss(z, [z, z], size=[6, 7]),
    "softmax_confidence": lambda z: fastmt.softmax_confidence([z, z]),
}
pytestmark = pytest.mark.skipif(
    cpp_backend.missing() is not None, reason="the C++ kernels are not built"
)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_call_of_the_same_kinds_chooses_once_and_keeps_no_tensor(call, monkeypatch):
    chosen, choose = [], backends.choose
    monkeypatch.setattr(backends, "choose", lambda *a, **k: chosen.append(1) or choose(*a, **k))
    tensors = [LOGITS.clone() for _ in range(3)]
    for logits in tensors:
        call(logits)
    call(LOGITS[:, :4].contiguous() if call is not CALLS["cross_entropy"] else LOGITS.half())
    assert len(chosen) == 2
    held = [weakref.ref(tensor) for tensor in tensors]
    del tensors, logits
    gc.collect()
    assert [reference() for reference in held] == [None] * 3


def test_a_threshold_that_moves_is_of_one_kind():
    for threshold in (0.5, 0.6, 0.7):
        fastmt.consistency_loss(LOGITS, LOGITS, threshold=threshold)
    assert len(backends._answers) == 1


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"ignore_index": 255}, {"ignore_index": 255.0}),
        ({"label_smoothing": 1}, {"label_smoothing": "1"}),
        ({"pixel_weight": torch.ones(2, 6, 7)}, {"pixel_weight": np.ones((2, 6, 7))}),
        (
            {"pixel_weight": torch.ones(2, 6, 7)},
            {"pixel_weight": torch.ones(2, 6, 7, requires_grad=True)},
        ),
        ({"class_weight": torch.ones(5)}, {"class_weight": torch.ones(4)}),
    ],
)
def test_what_was_right_does_not_hide_what_is_wrong(right, wrong):
    fastmt.cross_entropy(LOGITS, LABELS, **right)
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(wrong))}: "):
        fastmt.cross_entropy(LOGITS, LABELS, **wrong)


def test_a_choice_follows_environment_and_context(monkeypatch):
    monkeypatch.delenv("FASTMT_BACKEND", raising=False)
    fastmt.cross_entropy(LOGITS, LABELS)
    monkeypatch.setenv("FASTMT_BACKEND", "cuda")
    with pytest.raises(ValueError, match="^FASTMT_BACKEND: got 'cuda'"):
        fastmt.cross_entropy(LOGITS, LABELS)
    with fastmt.backend("cpp", strict=True):
        fastmt.cross_entropy(LOGITS, LABELS)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="float64 is computed by the reference"):
                fastmt.cross_entropy(LOGITS.double(), LABELS)


def test_what_may_be_anything_is_of_no_kind():
    class Special(torch.Tensor):
        pass

    for argument in (np.float32(1), LOGITS.as_subclass(Special), LOGITS.to_sparse(), {}, [{}]):
        assert kinds_of([argument]) is None
    assert kinds_of([1]) != kinds_of([True]) != kinds_of([1.0])
    assert kinds_of([LOGITS, None]) == kinds_of([LOGITS * 2, None])
    assert kinds_of([LOGITS.shape]) == kinds_of([tuple(LOGITS.shape)]) is not None
    assert kinds_of([torch.nn.Parameter(LOGITS)]) != kinds_of([LOGITS])
