"""A small student, its trainer and batches, for the tests of training."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastmt.consistency import ConsistencyLoss
from fastmt.trainer import MeanTeacher

CLASSES = 4
STILL = {"style": None, "noise": None}  # no randomness, so that runs can be compared


class Net(nn.Module):
    """Logits at half resolution; records what it was given."""

    def __init__(self, norm=True, dropout=0.0, wrap=None):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(8, CLASSES, 1),
        )
        self.wrap = wrap
        self.seen = []

    def forward(self, images):
        self.seen.append(images.detach().clone())
        logits = self.body(images)
        return logits if self.wrap is None else self.wrap(logits)


def make_trainer(net_options=None, optimizer=torch.optim.Adam, lr=1e-2, **options):
    torch.manual_seed(0)
    student = Net(**(net_options or {}))
    options.setdefault("consistency", ConsistencyLoss(threshold=0.0))
    return MeanTeacher(student, optimizer(student.parameters(), lr=lr), **options)


def make_batch(seed=0, count=2, size=(12, 16)):
    generator = torch.Generator().manual_seed(seed)
    source = torch.rand(count, 3, *size, generator=generator)
    labels = torch.randint(CLASSES, (count, *size), generator=generator, dtype=torch.uint8)
    labels[:, 0] = 255
    return source, labels, torch.rand(count, 3, *size, generator=generator)


class Stateful:
    """A schedule that gives another value at every call; it keeps those that it gave."""

    def __init__(self, factor):
        self.factor, self.given = factor, []

    def __call__(self, step):
        self.given.append(self.factor * (1 + len(self.given)))
        return self.given[-1]


def everything(trainer):
    parts = (trainer.student, trainer.teacher, trainer.optimizer)
    return copy.deepcopy([part.state_dict() for part in parts])


def assert_same(left, right):
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right
