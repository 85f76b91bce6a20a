"""Arguments that do not fit: the error names the argument, what came and what was expected."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

import fastmt
from fastmt.confidence import KINDS

Z = torch.zeros(2, 5, 6, 7)
LABELS = torch.zeros(2, 6, 7, dtype=torch.uint8)
MAP = torch.ones(2, 6, 7)
SHAPED = r"\(2, 6, 7\)"

pytestmark = pytest.mark.usefixtures("either")

CONFIDENCE = [
    ((None,), {}, TypeError, "logits: got NoneType"),
    (([],), {}, ValueError, "logits: got an empty sequence"),
    (({"out": Z},), {}, TypeError, "logits: got dict, expected a tensor of logits"),
    ((Z.long(),), {}, TypeError, "logits: got torch.int64, expected float32"),
    ((Z.to_sparse(),), {}, TypeError, "logits: got layout torch.sparse_coo"),
    ((torch.zeros(3),), {}, ValueError, r"logits: got shape \(3\), expected \(N, C"),
    ((torch.zeros(3, 0),), {}, ValueError, r"logits: got shape \(3, 0\)"),
    (([Z, Z[:, :4]],), {}, ValueError, r"logits: members of shapes \(2, 5, 6, 7\) and \(2, 4"),
    (([Z, Z[:, :, 0]],), {}, ValueError, "logits: members of shapes"),
    (([Z, Z[:, :, :5]],), {}, ValueError, r"logits: got spatial size \(5, 7\)"),
    (([Z, Z.to("meta")],), {}, ValueError, "logits: got a tensor on meta, expected cpu"),
    ((Z,), {"kind": "max"}, ValueError, "kind: got 'max', expected one of 'max_prob'"),
    ((Z,), {"kind": np.array(KINDS)}, ValueError, r"kind: got array\(.*, expected one of"),
    ((Z,), {"temperature": 0.0}, ValueError, "temperature: got 0.0"),
    ((Z,), {"temperature": float("inf")}, ValueError, "temperature: got inf"),
    ((Z,), {"temperature": 10**400}, ValueError, "temperature: got 1000"),
    ((Z,), {"temperature": "1"}, ValueError, "temperature: got '1'"),
    ((Z,), {"size": 12}, TypeError, "size: got 12, expected a sequence"),
    ((Z,), {"size": (12.0, 14.0)}, TypeError, r"size: got \(12.0, 14.0\)"),
    ((Z,), {"size": (True, True)}, TypeError, r"size: got \(True, True\), expected a sequence"),
    ((Z,), {"size": (12,)}, ValueError, r"size: got \(12,\), expected 2 integers"),
    ((Z,), {"size": (0, 3)}, ValueError, r"size: got \(0, 3\), expected positive"),
    ((Z,), {"size": (2**31, 1)}, ValueError, r"size: got \(2147483648, 1\), expected integers"),
    ((Z[:, :, :0],), {"size": (3, 3)}, ValueError, r"logits: got shape \(2, 5, 0, 7\)"),
    ((Z,), {"align_corners": "yes"}, TypeError, "align_corners: got 'yes', expected True or"),
]

CONSISTENCY = [
    ((Z, Z[:1]), {}, ValueError, r"teacher: got shape \(1, 5, 6, 7\), expected the N, C"),
    ((Z, Z[:, :4]), {}, ValueError, r"teacher: got shape \(2, 4, 6, 7\)"),
    ((Z, Z[..., 0]), {}, ValueError, r"teacher: got shape \(2, 5, 6\)"),
    ((Z, Z[..., :3]), {}, ValueError, r"teacher: got spatial size \(6, 3\), student has \(6, 7\)"),
    ((Z, Z.to("meta")), {}, ValueError, "teacher: got a tensor on meta, expected cpu"),
    ((Z, None), {}, TypeError, "teacher: got NoneType"),
    ((Z, []), {}, ValueError, "teacher: got an empty sequence"),
    ((Z, {"out": Z}), {}, TypeError, "teacher: got dict, expected a tensor of logits"),
    ((Z, Z.int()), {}, TypeError, "teacher: got torch.int32"),
    ((Z.bool(), Z), {}, TypeError, "student: got torch.bool"),
    ((None, Z), {}, TypeError, "student: got NoneType"),
    ((Z, Z), {"loss": "l1"}, ValueError, "loss: got 'l1', expected one of 'mse', 'kl'"),
    ((Z, Z), {"class_reduction": "none"}, ValueError, "class_reduction: got 'none'"),
    ((Z, Z), {"confidence": "max"}, ValueError, "confidence: got 'max'"),
    ((Z, Z), {"weight": "hard"}, ValueError, "weight: got 'hard'"),
    ((Z, Z), {"normalize": "sum"}, ValueError, "normalize: got 'sum'"),
    ((Z, Z), {"temperature": -1.0}, ValueError, "temperature: got -1.0"),
    ((Z, Z), {"threshold": torch.ones(4)}, ValueError, r"threshold: got shape \(4\), expected .*5"),
    ((Z, Z), {"threshold": torch.ones(5, 1)}, ValueError, r"threshold: got shape \(5, 1\)"),
    ((Z, Z), {"threshold": "0.9"}, TypeError, "threshold: got str"),
    ((Z, Z), {"threshold": torch.ones(5).to_sparse()}, TypeError, "threshold: got layout torch.sp"),
    ((Z, Z), {"threshold": torch.tensor(1j)}, TypeError, "threshold: got torch.complex64"),
    ((Z, Z), {"threshold": 10**400}, ValueError, "threshold: got 1000"),
    ((Z, Z), {"strict": "no"}, TypeError, "strict: got 'no', expected True or False"),
    ((Z, Z), {"strict": 0.5}, TypeError, "strict: got 0.5, expected True or False"),
    ((Z, Z), {"align_corners": 2}, TypeError, "align_corners: got 2, expected True or False"),
    ((Z, Z), {"threshold": torch.ones(5, device="meta")}, ValueError, "threshold: got a tensor on"),
    (
        (Z, Z),
        {"threshold": torch.ones((), device="meta")},
        ValueError,
        "threshold: got a tensor on",
    ),
    ((Z, Z), {"pixel_weight": MAP[:1]}, ValueError, f"pixel_weight: got shape .*expected {SHAPED}"),
    ((Z, Z), {"pixel_weight": MAP.long()}, TypeError, "pixel_weight: got torch.int64"),
    ((Z, Z), {"pixel_weight": 2.0}, TypeError, "pixel_weight: got float"),
    ((Z, Z), {"pixel_weight": MAP.to("meta")}, ValueError, "pixel_weight: got a tensor on meta"),
    ((Z, Z), {"pixel_weight": MAP.clone().requires_grad_()}, ValueError, "pixel_weight: requires"),
    ((Z, Z), {"pixel_weight": MAP.to_sparse()}, TypeError, "pixel_weight: got layout torch.sp"),
    ((Z, Z), {"valid": MAP}, TypeError, "valid: got torch.float32, expected bool"),
    ((Z, Z), {"valid": MAP[:, 1:].bool()}, ValueError, f"valid: got shape .*expected {SHAPED}"),
    ((Z, Z), {"valid": MAP.bool(), "size": (12, 14)}, ValueError, "valid: got shape"),
    ((Z, Z), {"size": (12, 14, 3)}, ValueError, "size: got"),
]

CROSS_ENTROPY = [
    ((Z, None), {}, TypeError, "labels: got NoneType"),
    ((Z, LABELS.float()), {}, TypeError, "labels: got torch.float32, expected uint8 or int64"),
    ((Z, LABELS.int()), {}, TypeError, "labels: got torch.int32"),
    ((Z, LABELS[:1]), {}, ValueError, r"labels: got shape \(1, 6, 7\), expected \(2, "),
    ((Z, LABELS[0]), {}, ValueError, r"labels: got shape \(6, 7\)"),
    ((Z, LABELS[:, :0]), {}, ValueError, r"labels: got size \(0, 7\), expected positive integers"),
    (
        (Z[..., None, None], LABELS[..., None, None].expand(-1, -1, -1, 2, 2)),
        {},
        ValueError,
        r"labels: got size \(6, 7, 2, 2\) for logits .*: 1 to 3 dimensions can be up-sampled",
    ),
    ((Z, LABELS.to("meta")), {}, ValueError, "labels: got a tensor on meta"),
    ((Z, LABELS.to_sparse()), {}, TypeError, "labels: got layout torch.sparse_coo, expected a str"),
    ((Z.long(), LABELS), {}, TypeError, "logits: got torch.int64"),
    ((torch.zeros(2, 5, 0, 7), LABELS), {}, ValueError, r"logits: got shape \(2, 5, 0, 7\)"),
    ((Z, LABELS), {"class_weight": torch.ones(4)}, ValueError, r"class_weight: got shape \(4\)"),
    (
        (Z, LABELS),
        {"class_weight": torch.ones(5).int()},
        TypeError,
        "class_weight: got torch.int32",
    ),
    ((Z, LABELS), {"class_weight": [1.0] * 5}, TypeError, "class_weight: got list"),
    ((Z, LABELS), {"pixel_weight": MAP[:1]}, ValueError, "pixel_weight: got shape"),
    ((Z, LABELS), {"normalize": "selected"}, ValueError, "normalize: got 'selected'"),
    ((Z, LABELS), {"ignore_index": None}, TypeError, "ignore_index: got NoneType"),
    ((Z, LABELS), {"ignore_index": 255.0}, TypeError, "ignore_index: got float"),
    ((Z, LABELS), {"ignore_index": torch.ones(2).int()}, TypeError, "ignore_index: got Tensor"),
    ((Z, LABELS), {"ignore_index": 2**63}, ValueError, "ignore_index: got 9223372036854775808"),
    ((Z, LABELS), {"label_smoothing": "0.1"}, TypeError, "label_smoothing: got str"),
    (
        (Z, LABELS),
        {"label_smoothing": torch.ones(2)},
        TypeError,
        r"label_smoothing: got shape \(2\)",
    ),
    (
        (Z, LABELS),
        {"label_smoothing": torch.tensor(1j)},
        TypeError,
        "label_smoothing: got torch.complex64, expected real numbers",
    ),
    (
        (Z, LABELS),
        {"label_smoothing": torch.tensor(True)},
        TypeError,
        "label_smoothing: got torch.bool, expected real numbers",
    ),
    ((Z, LABELS), {"label_smoothing": 1.5}, ValueError, "label_smoothing: got 1.5"),
    ((Z, LABELS), {"align_corners": "no"}, TypeError, "align_corners: got 'no', expected True or"),
    ((Z, LABELS), {"label_smoothing": float("nan")}, ValueError, "label_smoothing: got nan"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), CONFIDENCE)
def test_softmax_confidence_names_what_does_not_fit(arguments, options, error, message):
    with pytest.raises(error, match=f"^(?:{message})"):
        fastmt.softmax_confidence(*arguments, **options)


@pytest.mark.parametrize(("arguments", "options", "error", "message"), CONSISTENCY)
def test_consistency_loss_names_what_does_not_fit(arguments, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        fastmt.consistency_loss(*arguments, **options)


@pytest.mark.parametrize(("arguments", "options", "error", "message"), CROSS_ENTROPY)
def test_cross_entropy_names_what_does_not_fit(arguments, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        fastmt.cross_entropy(*arguments, **options)


@pytest.mark.parametrize("threshold", [0, 1, 0.5, torch.tensor(0.5), torch.tensor(0.5).double()])
def test_thresholds_of_any_number_type_are_accepted(threshold):
    assert fastmt.consistency_loss(Z, Z, threshold=threshold).item() == 0


def test_messages_are_one_line():
    with pytest.raises(ValueError, match="teacher") as error:
        fastmt.consistency_loss(Z, Z[:1])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", [1, np.True_, None])
def test_flags_may_be_numbers_and_those_of_numpy_and_none_as_in_pytorch(flag):
    given, expected = (
        fastmt.softmax_confidence(Z.cumsum(3), size=(11, 13), align_corners=align).score
        for align in (flag, bool(flag))
    )
    assert torch.equal(given, expected)


def test_numbers_of_numpy_and_fractions_are_numbers():
    call = {"threshold": 0.25, "temperature": 0.5}
    expected = fastmt.consistency_loss(Z + 1, Z, **call)
    for kind in (np.float16, np.float32, np.float64, Fraction):
        given = {name: kind(value) for name, value in call.items()}
        assert fastmt.consistency_loss(Z + 1, Z, **given) == expected
    score = fastmt.softmax_confidence(Z, temperature=np.int64(2)).score
    assert torch.equal(score, fastmt.softmax_confidence(Z, temperature=2).score)
    given, expected = (
        fastmt.cross_entropy(Z, LABELS, label_smoothing=e) for e in (Fraction(1, 2), 0.5)
    )
    assert given == expected
