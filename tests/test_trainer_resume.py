"""A run that goes on from a checkpoint, and checkpoints that do not fit."""

from __future__ import annotations

import pytest
import torch
from training import assert_same, everything, make_batch, make_trainer

from fastmt.checkpoint import CheckpointError
from fastmt.schedules import LinearRampUp


@pytest.mark.parametrize("amp", [None, torch.float16])
def test_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, amp):
    def make():
        trainer = make_trainer(
            {"dropout": 0.3}, jitter={}, class_mixing=0.5, weight=LinearRampUp(2.0, 5), amp=amp
        )
        trainer.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            trainer.optimizer, 1e-2, total_steps=8
        )
        return trainer

    trainer = make()
    for seed in range(3):
        trainer.step(*make_batch(seed))
    trainer.save(tmp_path / "run.pt", {"note": "kept"})
    expected = [trainer.step(*make_batch(seed)) for seed in range(3, 8)]

    resumed = make()
    torch.manual_seed(99)
    assert resumed.resume(tmp_path / "run.pt") == {"note": "kept"}
    for seed, uninterrupted in zip(range(3, 8), expected, strict=True):
        assert resumed.step(*make_batch(seed)).as_dict() == uninterrupted.as_dict()
    assert_same(everything(trainer), everything(resumed))


def test_checkpoint_of_another_architecture_is_refused_and_changes_nothing(tmp_path):
    make_trainer().save(tmp_path / "run.pt")
    other = make_trainer({"norm": False})
    before = everything(other)
    with pytest.raises(CheckpointError, match=r"run\.pt.*body\.1\.weight"):
        other.resume(tmp_path / "run.pt")
    assert_same(before, everything(other))


def test_checkpoint_of_another_optimizer_is_refused(tmp_path):
    make_trainer().save(tmp_path / "run.pt")
    other = make_trainer()
    other.optimizer = torch.optim.Adam(other.student.body[0].parameters())
    with pytest.raises(CheckpointError, match="optimiser"):
        other.resume(tmp_path / "run.pt")
