"""A short adaptation with the fused operations follows the one in plain PyTorch."""

import warnings

import pytest
import torch
from torch import nn

from fastmt import backend
from fastmt.consistency import ConsistencyLoss
from fastmt.data import Batches, Scenes
from fastmt.networks import UNet
from fastmt.schedules import SigmoidRampUp
from fastmt.trainer import MeanTeacher

STEPS = 20


@pytest.fixture(scope="module")
def batches():
    day = Batches(Scenes("day", 8, size=(32, 48)), 4, seed=1)
    dusk = Batches(Scenes("dusk", 8, seed=1, size=(32, 48), labelled=False), 4, seed=2)
    return [(*day.batch(step), dusk.batch(step)[0]) for step in range(STEPS)]


def run(name, batches, stride):
    torch.manual_seed(0)
    student: nn.Module = UNet(8, width=4, stride=stride)
    trainer = MeanTeacher(
        student,
        torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9),
        # The score as weight, as a pixel whose mask flips at the threshold would part the curves.
        consistency=ConsistencyLoss(confidence="entropy", weight="confidence", threshold=0.01),
        decay=0.5,
        weight=SigmoidRampUp(10.0, STEPS),
        jitter={},
    )
    with warnings.catch_warnings(), backend(name):
        warnings.simplefilter("ignore", RuntimeWarning)  # without kernels both are eager
        reports = [trainer.step(*batch).as_dict() for batch in batches]
    return {key: torch.tensor([report[key] for report in reports]) for key in reports[0]}


@pytest.mark.parametrize("stride", [2, 4])
def test_fused_and_eager_training_have_the_same_loss_curves(batches, stride):
    eager, fused = (run(name, batches, stride) for name in ("eager", "auto"))
    assert eager["loss"][-5:].mean() < 0.8 * eager["loss"][:5].mean()
    assert eager["consistency"].max() > 0 and 0 < eager["selected"][-1] <= 1
    for name in ("loss", "supervised", "consistency", "mean_score"):
        torch.testing.assert_close(fused[name], eager[name], rtol=2e-2, atol=1e-3)
    # Rounding differs, so a pixel at the threshold may fall on either side of it.
    assert (fused["selected"] - eager["selected"]).abs().max() < 0.02
