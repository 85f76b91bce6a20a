"""What losses keep from step to step goes on in a resumed run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from training import CLASSES, assert_same, everything, make_batch, make_trainer

from fastmt.checkpoint import CheckpointError
from fastmt.confidence import softmax_confidence
from fastmt.consistency import ConsistencyLoss
from fastmt.cross_entropy import CrossEntropy


class Balanced(ConsistencyLoss):
    """Each class's threshold follows the mean confidence in that class, as in FreeMatch."""

    def forward(self, student, teacher, **call):
        score, label = softmax_confidence(teacher, size=call["size"])
        of_class = F.one_hot(label, CLASSES).flatten(0, -2).to(score.dtype)
        mean = score.flatten() @ of_class / of_class.sum(0).clamp(min=1)
        self.threshold.lerp_(mean, 0.5)
        return super().forward(student, teacher, **call)


def balanced(classes=CLASSES):
    return make_trainer(consistency=Balanced(threshold=torch.zeros(classes)))


@pytest.mark.parametrize("compiled", [False, True])
def test_thresholds_that_the_loss_moves_go_on_where_they_were(tmp_path, compiled):
    first, second = balanced(), balanced()
    if compiled:
        second.consistency = torch.compile(second.consistency, backend="eager")
    for seed in range(2):
        first.step(*make_batch(seed))
    first.save(tmp_path / "run.pt")
    second.resume(tmp_path / "run.pt")
    reports = [trainer.step(*make_batch(2)).as_dict() for trainer in (first, second)]
    assert reports[0] == reports[1]
    assert first.consistency.threshold.min() > 0
    assert_same(everything(first), everything(second))


def test_weights_of_classes_that_move_go_on_where_they_were(tmp_path):
    first, second = (
        make_trainer(supervised=CrossEntropy(class_weight=torch.ones(CLASSES))) for _ in range(2)
    )
    first.supervised.class_weight[0] = 3.0
    first.save(tmp_path / "run.pt")
    second.resume(tmp_path / "run.pt")
    assert second.supervised.class_weight.tolist() == [3.0, 1.0, 1.0, 1.0]


def test_a_checkpoint_of_losses_without_a_state_leaves_that_of_the_trainer(tmp_path):
    make_trainer().save(tmp_path / "run.pt")
    resumed = balanced()
    resumed.resume(tmp_path / "run.pt")
    assert resumed.consistency.threshold.tolist() == [0.0] * CLASSES


def test_a_checkpoint_of_a_loss_of_other_classes_is_refused_and_changes_nothing(tmp_path):
    trainer, other = balanced(), balanced(classes=2)
    trainer.step(*make_batch())
    trainer.save(tmp_path / "run.pt")
    before = everything(other)
    message = r"'threshold' has shape \(4,\) .*, the consistency loss expects shape \(2,\)"
    with pytest.raises(CheckpointError, match=message):
        other.resume(tmp_path / "run.pt")
    assert_same(before, everything(other))
    assert other.consistency.threshold.tolist() == [0.0, 0.0]
