"""What student and teacher look at in a step: noise, several passes, mixed classes."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from training import STILL, assert_same, make_batch, make_trainer

from fastmt.consistency import ConsistencyLoss, consistency_loss
from fastmt.cross_entropy import CrossEntropy, cross_entropy


def test_class_mixing_pastes_source_pixels_that_the_labels_teach_and_not_the_teacher():
    calls = []

    class Recorded(ConsistencyLoss):
        def forward(self, student, teacher, **call):
            calls.append(call["valid"])
            return super().forward(student, teacher, **call)

    trainer = make_trainer(class_mixing=1.0, consistency=Recorded(threshold=0.0), **STILL)
    source, labels, target = make_batch()
    before = copy.deepcopy(trainer.student)
    report = trainer.step(source, labels, target)
    view = trainer.student.seen[0][2:]
    pasted = (view == source).all(1) & (view != target).all(1)
    assert torch.equal(torch.where(pasted[:, None], source, target), view)
    assert 0 < pasted.float().mean() < 1 and not pasted[:, 0].any()
    for image, mask in zip(labels, pasted, strict=True):
        assert len(image[mask].unique()) == 2  # half of four classes
    assert torch.equal(calls[0], ~pasted)
    logits = before(trainer.student.seen[0]).split(2)
    known = [labels, labels.masked_fill(~pasted, 255)]
    torch.testing.assert_close(report.supervised, sum(map(cross_entropy, logits, known)))


def test_class_mixing_never_happens_at_probability_zero():
    trainer = make_trainer(**STILL)
    source, labels, target = make_batch()
    trainer.step(source, labels, target)
    assert torch.equal(trainer.student.seen[0][2:], target)


def test_the_noise_is_that_of_the_method_unless_told():
    trainer = make_trainer()
    source, labels, target = make_batch(size=(64, 64))
    trainer.step(source, labels, target)
    noise = (trainer.student.seen[0][2:] - target).abs()
    assert noise.max().item() == pytest.approx(0.2)
    beyond = 1 - math.erf(2 / math.sqrt(2))  # two standard deviations
    assert (noise > 0.1999).float().mean().item() == pytest.approx(beyond, rel=0.15)


def test_the_global_generator_is_never_drawn_from():
    trainer = make_trainer(jitter={}, class_mixing=1.0)
    state = torch.get_rng_state()
    trainer.step(*make_batch())
    assert torch.equal(state, torch.get_rng_state())


def test_the_callers_tensors_are_never_written():
    batch = make_batch()
    copies = [tensor.clone() for tensor in batch]
    make_trainer(jitter={}, class_mixing=1.0).step(*batch)
    assert_same(list(batch), copies)


def test_a_student_that_writes_into_its_input_leaves_the_callers_images():
    def normalise(network, images):
        images[0].sub_(0.4)

    trainer, batch = make_trainer(**STILL), make_batch()
    for network in (trainer.student, trainer.teacher.module):
        network.register_forward_pre_hook(normalise)
    copies = [tensor.clone() for tensor in batch]
    trainer.step(*batch)
    trainer.supervised_step(*batch[:2])
    assert_same(list(batch), copies)


def test_jitter_has_the_options_that_it_was_given():
    grey = {"brightness": 0, "contrast": 0, "saturation": 0, "greyscale": 1}
    source, labels, target = make_batch()
    trainer = make_trainer(jitter=grey, **STILL)
    trainer.step(source, labels, target)
    images = torch.cat([source, target])
    luma = torch.einsum("nchw,c->nhw", images, torch.tensor([0.299, 0.587, 0.114]))
    torch.testing.assert_close(trainer.student.seen[0], luma[:, None].expand_as(images))


def test_several_passes_of_the_teacher_have_their_own_noise_and_are_averaged():
    trainer = make_trainer(style=None, passes=3, optimizer=torch.optim.SGD)
    source, labels, target = make_batch()
    student, teacher = copy.deepcopy(trainer.student), copy.deepcopy(trainer.student)
    report = trainer.step(source, labels, target)
    views = trainer.teacher.module.seen
    assert len(views) == 3 and len({view.sum().item() for view in views}) == 3
    assert all(0 < (view - target).abs().max() <= 0.2 + 1e-6 for view in views)
    logits = student(trainer.student.seen[0])[len(source) :]
    size = target.shape[2:]
    expected = consistency_loss(logits, [teacher(v) for v in views], threshold=0.0, size=size)
    assert report.item("consistency") == pytest.approx(expected.item(), rel=1e-5)


def test_several_passes_go_together_with_parts_of_a_batch():
    trainer = make_trainer(passes=2, accumulate=2)
    trainer.step(*make_batch(count=4))
    assert [len(view) for view in trainer.teacher.module.seen] == [2] * 4


def to_full_size(logits):
    return nn.functional.interpolate(logits, scale_factor=2, mode="bilinear")


@pytest.mark.parametrize(
    ("supervised", "ignored"),
    [
        (nn.CrossEntropyLoss(ignore_index=200), 200),
        (nn.CrossEntropyLoss(), -100),
        (CrossEntropy(ignore_index=-1), -1),
        (partial(nn.functional.cross_entropy, ignore_index=9), 9),
        (cross_entropy, 255),
    ],
)
def test_pixels_without_a_label_get_the_one_that_the_loss_ignores(supervised, ignored):
    net = {"wrap": to_full_size}
    trainer = make_trainer(net, supervised=supervised, class_mixing=1.0)
    source, labels, target = make_batch()
    labels = labels.where(labels != 255, 0)
    if isinstance(supervised, (nn.CrossEntropyLoss, partial)):
        labels = labels.long()
    assert trainer.views.ignore_index == ignored
    assert math.isfinite(trainer.step(source, labels, target).item("loss"))


def test_a_loss_that_does_not_say_what_it_ignores_is_told_where_images_are_mixed():
    def supervised(logits, labels):
        return nn.functional.cross_entropy(logits, labels.long(), ignore_index=77)

    options = {"net_options": {"wrap": to_full_size}, "supervised": supervised}
    with pytest.raises(ValueError, match="^ignore_index: got None"):
        make_trainer(class_mixing=1.0, **options)
    trainer = make_trainer(class_mixing=1.0, ignore_index=77, **options)
    source, labels, target = make_batch()
    report = trainer.step(source, labels.where(labels != 255, 77), target)
    assert math.isfinite(report.item("loss"))
    make_trainer(**options)
