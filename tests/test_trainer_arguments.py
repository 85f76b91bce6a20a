"""Options, batches and networks that do not fit are named."""

from __future__ import annotations

import pytest
import torch
from training import make_batch, make_trainer


@pytest.mark.parametrize("wrap", [lambda z: (z,), lambda z: {"logits?": z}, lambda z: z.argmax(1)])
def test_outputs_that_are_no_logits_are_named(wrap):
    with pytest.raises(TypeError, match="student: returned"):
        make_trainer({"wrap": wrap}).step(*make_batch())


def _replace(index, change):
    batch = list(make_batch())
    batch[index] = change(batch[index])
    return batch


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (_replace(1, lambda y: y.float()), TypeError, "source_labels: got torch.float32"),
        (_replace(1, lambda y: y[:, :6]), ValueError, r"source_labels: .*\(2, 6, 16\)"),
        (_replace(1, lambda y: y.clone().fill_(9)), ValueError, "labels: got label 9"),
        (_replace(0, lambda x: (x * 255).byte()), TypeError, "source_images: got torch.uint8"),
        (_replace(0, lambda x: x * 255), ValueError, r"source_images: got values .* \[0, 1\]"),
        (_replace(2, lambda x: x - 1), ValueError, "target_images: got values"),
        (_replace(2, lambda x: x[..., :8]), ValueError, "target_images: .*source_images"),
        (_replace(2, lambda x: x.double()), ValueError, "target_images: got torch.float64"),
        (_replace(2, lambda x: x.to("meta")), ValueError, "target_images: got images on meta"),
        (_replace(2, lambda x: x[:0]), ValueError, "target_images: .*not empty"),
        (_replace(2, lambda x: None), TypeError, "target_images: got NoneType"),
    ],
)
def test_batches_that_do_not_fit_are_named(batch, error, message):
    if batch[2] is None:
        batch[2] = [1]
        message = "target_images: got list"
    with pytest.raises(error, match=message):
        make_trainer().step(*batch)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"amp": torch.int8}, ValueError, "amp"),
        ({"class_mixing": 1.5}, ValueError, "class_mixing"),
        ({"accumulate": 0}, ValueError, "accumulate"),
        ({"style": "rococo"}, ValueError, "style"),
        ({"weight": "much"}, TypeError, "schedule"),
    ],
)
def test_options_that_do_not_fit_are_named(options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(**options)


def test_batches_that_cannot_be_split_or_mixed_are_named():
    source, labels, target = make_batch(count=4)
    with pytest.raises(ValueError, match=r"target_images: got 3 .* multiple of 2"):
        make_trainer(accumulate=2).step(source, labels, target[:3])
    with pytest.raises(ValueError, match="class_mixing"):
        make_trainer(class_mixing=1.0).step(source, labels, target[:3])
