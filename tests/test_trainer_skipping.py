"""A step that is not finite, or that raises, leaves everything as it was."""

from __future__ import annotations

import math

import pytest
import torch
from training import assert_same, everything, make_batch, make_trainer


@pytest.mark.parametrize("options", [{}, {"amp": torch.float16}, {"clip_norm": 1.0}])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_non_finite_loss_leaves_everything_bitwise_unchanged_and_counts(options, optimizer):
    trainer = make_trainer(optimizer=optimizer, **options)
    trainer.step(*make_batch(0))
    before = everything(trainer)
    source, labels, target = make_batch(1)
    source[0, 0, 3, 3] = math.nan
    report = trainer.step(source, labels, target)
    assert not math.isfinite(report.item("loss")) and report.item("skipped") == 1
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
