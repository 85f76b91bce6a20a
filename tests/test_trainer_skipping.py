"""A step that is not finite, or that raises, leaves everything as it was."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import CLASSES, Net, assert_same, everything, make_batch, make_trainer

from fastmt import skipping
from fastmt.trainer import MeanTeacher


@pytest.mark.parametrize("options", [{}, {"amp": torch.float16}, {"clip_norm": 1.0}])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_non_finite_loss_leaves_everything_bitwise_unchanged_and_counts(options, optimizer):
    trainer = make_trainer(optimizer=optimizer, **options)
    first = trainer.step(*make_batch(0))
    before = everything(trainer)
    source, labels, target = make_batch(1)
    source[0, 0, 3, 3] = math.nan
    report = trainer.step(source, labels, target)
    assert not math.isfinite(report.item("loss")) and report.item("skipped") == 1
    assert first.item("skipped") == 0  # a report stays as it was
    assert_same(before, everything(trainer))
    report = trainer.step(*make_batch(2))
    assert math.isfinite(report.item("loss")) and report.item("skipped") == 1
    assert not torch.equal(before[0]["body.0.weight"], trainer.student.body[0].weight)


def test_non_finite_gradient_of_a_finite_loss_is_skipped():
    def overflow(logits, labels):
        return logits.sum().sub(logits.sum().detach()).abs().sqrt()  # 0 with gradient inf * sign

    trainer = make_trainer(supervised=overflow)
    before = everything(trainer)
    report = trainer.step(*make_batch())
    assert math.isfinite(report.item("loss")) and report.item("skipped") == 1
    assert_same(before, everything(trainer))


def test_skipped_step_of_float16_lowers_the_loss_scale():
    trainer = make_trainer(amp=torch.float16)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    report = trainer.step(*make_batch())
    assert report.item("skipped") == 1 and trainer.scaler.get_scale() == 2.0**126


@pytest.mark.parametrize("supervised", [False, True])
def test_a_step_that_raises_leaves_everything_as_it_was(supervised):
    trainers = [make_trainer(jitter={}, class_mixing=0.5) for _ in range(2)]
    for trainer in trainers:
        trainer.step(*make_batch(0))
    failing, other = trainers
    source, labels, target = make_batch(1)
    labels[0, 5, 5] = CLASSES + 3
    before = everything(failing)
    with pytest.raises(ValueError, match="got label 7"):
        if supervised:
            failing.supervised_step(source, labels)
        else:
            failing.step(source, labels, target)
    assert failing.steps == 1
    assert_same(before, everything(failing))
    reports = [trainer.step(*make_batch(2)).as_dict() for trainer in trainers]
    assert reports[0] == reports[1]
    assert_same(*map(everything, (failing, other)))


@pytest.mark.parametrize("supervised", [False, True])
def test_dropout_draws_the_numbers_of_a_step_that_raised_again(supervised):
    trainer = make_trainer({"dropout": 0.5})
    source, labels, target = make_batch()
    labels[0, 5, 5] = CLASSES + 3
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="got label 7"):
        if supervised:
            trainer.supervised_step(source, labels)
        else:
            trainer.step(source, labels, target)
    assert torch.equal(torch.get_rng_state(), before)


class Centred(nn.Module):
    """Puts another tensor in the place of its buffer, where BatchNorm2d writes into its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, CLASSES, 1)
        self.register_buffer("centre", torch.zeros(CLASSES, 1, 1))

    def forward(self, images):
        logits = self.body(images)
        self.centre = self.centre.lerp(logits.detach().mean((0, 2, 3)).view(-1, 1, 1), 0.1)
        return logits - self.centre


@pytest.mark.parametrize("wait", [True, False])
def test_buffers_that_a_network_replaces_are_put_back_as_well(wait):
    network = Centred()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, fused=True)
    trainer = MeanTeacher(network, optimizer, class_mixing=1.0, capturable=not wait)
    trainer.step(*make_batch(0))
    assert network.centre.any() and torch.equal(network.centre, trainer.teacher.module.centre)
    before = everything(trainer)
    source, labels, target = make_batch(1)
    source[0, 0, 3, 3] = math.nan
    assert trainer.step(source, labels, target).item("skipped") == 1
    assert_same(before, everything(trainer))


class Observed(Net):
    """Observes the largest logit of each class, from its first batch on, as PyTorch's observers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.empty(0))

    def forward(self, images):
        logits = super().forward(images)
        largest = logits.detach().amax((0, 2, 3))
        self.largest.resize_(largest.shape).copy_(largest)
        return logits


def test_a_network_whose_buffers_get_their_size_by_a_batch_has_to_see_one_before():
    network = Observed()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    trainer = MeanTeacher(network, optimizer)
    with pytest.raises(ValueError, match="^student: .*see a batch before the trainer is made"):
        trainer.step(*make_batch())
    assert MeanTeacher(network, optimizer).step(*make_batch()).item("skipped") == 0


def test_an_expanded_buffer_stays_as_it_is():
    network = nn.BatchNorm2d(3)
    network.register_buffer("mean", torch.full((1, 1, 1), 0.5).expand(3, 1, 1))
    kept, mean = skipping.Buffers(network), network.mean
    network.running_mean += 1
    kept.put_back_unless(torch.tensor(False))
    assert network.mean is mean and not network.running_mean.any()
    network.running_mean += 1
    kept.put_back()
    assert network.mean is mean and not network.running_mean.any()


def test_a_step_on_swapped_weights_is_refused_before_anything_moves():
    trainer = make_trainer()
    trainer.step(*make_batch())
    before = everything(trainer)
    with trainer.teacher.swapped(), pytest.raises(RuntimeError, match="^step: .*swapped"):
        trainer.step(*make_batch())
    with trainer.teacher.swapped(), pytest.raises(RuntimeError, match="^step: .*swapped"):
        trainer.supervised_step(*make_batch()[:2])
    assert trainer.steps == 1
    assert_same(before, everything(trainer))


def test_a_step_whose_scheduler_has_ended_is_counted_all_the_same():
    trainer = make_trainer()
    trainer.scheduler = torch.optim.lr_scheduler.OneCycleLR(trainer.optimizer, 0.1, total_steps=2)
    trainer.step(*make_batch())
    with pytest.raises(ValueError, match="Tried to step"):
        for _ in range(2):
            trainer.step(*make_batch())
    assert trainer.steps == trainer.teacher.updates == 3


def test_a_scheduler_does_not_warn_of_a_first_step_that_was_skipped():
    trainer = make_trainer()
    trainer.scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 1)
    source, labels, target = make_batch()
    source[0, 0, 0, 0] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trainer.step(source, labels, target).item("skipped") == 1


class Layers(nn.Module):
    """Buffers of few shapes and types in many layers, one of them strided."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.Sequential(*(nn.BatchNorm2d(3 + n % 2) for n in range(layers)))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("strided", torch.arange(6.0).view(2, 3).t())


def changed(network):
    for buffer in network.buffers():
        buffer.copy_(torch.full_like(buffer, math.nan) if buffer.is_floating_point() else ~buffer)


@pytest.mark.parametrize("finite", [None, True, False])
def test_buffers_are_put_back_exactly_where_the_step_is_left_out(finite):
    network = Layers(4)
    before = copy.deepcopy(network.state_dict())
    buffers = skipping.Buffers(network)
    changed(network)
    expected = copy.deepcopy(network.state_dict()) if finite else before
    if finite is None:
        buffers.put_back()
    else:
        buffers.put_back_unless(torch.tensor(finite))
    for name, buffer in network.state_dict().items():
        torch.testing.assert_close(buffer, expected[name], rtol=0, atol=0, equal_nan=True)


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_to_keep_and_put_back_buffers_takes_as_many_calls_in_more_layers():
    counts = []
    for layers in (2, 40):
        network = Layers(layers)
        with Counted() as counted:
            skipping.Buffers(network).put_back_unless(torch.tensor(False))
        counts.append(counted.calls)
    assert counts[0] == counts[1]


def test_an_optimiser_whose_state_turned_fused_off_is_not_trusted_to_skip():
    weight = torch.zeros(2, requires_grad=True)
    fused, plain = (torch.optim.Adam([weight], fused=fused) for fused in (True, False))
    assert skipping.can_skip(fused) and not skipping.can_skip(plain)
    fused.load_state_dict(plain.state_dict())
    assert not skipping.can_skip(fused)


def test_an_optimiser_skips_only_where_all_its_groups_are_fused():
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "fused": fused} for fused in (True, False)]
    assert not skipping.can_skip(torch.optim.Adam(groups, fused=True))


def test_an_optimiser_that_left_out_a_step_makes_the_next_one():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    weight.grad = torch.ones(2)
    no_buffers = skipping.Buffers(nn.Identity())
    skipping.step_where(torch.tensor(False), optimizer, no_buffers, wait=False)
    assert weight.tolist() == [1, 1]
    optimizer.step()
    assert weight.tolist() == [0, 0]
