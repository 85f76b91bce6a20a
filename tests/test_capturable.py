"""A trainer whose step never reads a tensor, as what a CUDA graph holds must not."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training import STILL, Net, assert_same, everything, make_batch

from fastmt import decays, perturb
from fastmt.consistency import ConsistencyLoss
from fastmt.cross_entropy import CrossEntropy
from fastmt.schedules import LinearRampUp, OnDevice
from fastmt.teacher import EMATeacher
from fastmt.trainer import MeanTeacher

READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")
METHODS = ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "cpu", "numpy")
MOVING = {"weight": LinearRampUp(4.0, 4), "threshold": lambda t: 0.2 + 0.02 * t}


def make_trainer(capturable=True, optimizer=torch.optim.Adam, rate=1e-2, **options):
    torch.manual_seed(0)
    student = Net()
    options = {"consistency": ConsistencyLoss(confidence="entropy"), **MOVING, **options}
    options.setdefault("teacher", EMATeacher(student, decays.Cosine(0.5, 4)))
    own = {} if optimizer is torch.optim.SGD else {"capturable": capturable}
    fused = optimizer(student.parameters(), lr=rate, fused=True, **own)
    return MeanTeacher(student, fused, capturable=capturable, **options)


class Read(AssertionError):
    """Something waited for a device."""


class NoReadByOperator(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in READS:
            raise Read(str(function))
        if function.overloadpacket.__name__ == "index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            raise Read("index by a mask")
        return function(*args, **(kwargs or {}))


class NoReadByMethod(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in METHODS:
            raise Read(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def nothing_is_read(monkeypatch):
    """A context in which a host that waits for a tensor is an error.

    The checks of labels are left out: they read on a CPU only.
    """
    monkeypatch.setattr(sys.modules[CrossEntropy.__module__], "_refuse", lambda *_: None)
    monkeypatch.setattr(perturb, "_check_range", lambda *_: None)

    @contextlib.contextmanager
    def context():
        with NoReadByOperator(), NoReadByMethod():
            yield

    return context


OPTIONS = {
    "plain": {"style": None, "noise": None},
    "style and noise": {},
    "all": {
        "style": "statistics",
        "jitter": {},
        "class_mixing": 1.0,
        "clip_norm": 1.0,
        "accumulate": 2,
        "amp": torch.bfloat16,
    },
    "threshold by class": {"threshold": lambda t: torch.linspace(0, 0.1 * t, 4)},
    "no threshold": {"threshold": None},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_capturable_step_reads_no_tensor(options, optimizer, nothing_is_read):
    trainer = make_trainer(optimizer=optimizer, **options)
    trainer.step(*make_batch())  # the first step looks at the range of the images
    with nothing_is_read():
        report = trainer.step(*make_batch())
    assert report.item("loss") > 0
    assert trainer.steps == 2


def test_an_ordinary_step_on_a_cpu_reads_and_is_noticed(nothing_is_read):
    trainer = make_trainer(capturable=False)
    trainer.step(*make_batch())
    with pytest.raises(Read), nothing_is_read():
        trainer.step(*make_batch())
    for read in (torch.Tensor.tolist, torch.Tensor.nonzero, bool, float, lambda x: x[x > 0]):
        with pytest.raises(Read), nothing_is_read():
            read(torch.ones(1))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_capturable_trainer_trains_like_an_ordinary_one(options):
    # Adam would blow up the rounding of gradients that are zero but for it.
    trainers = [make_trainer(c, torch.optim.SGD, **options) for c in (True, False)]
    for seed in range(4):
        reports = [trainer.step(*make_batch(seed)).as_dict() for trainer in trainers]
        assert reports[0] == pytest.approx(reports[1], rel=1e-5)
    states = list(map(everything, trainers))
    for mine, other in zip(tensors(states[0]), tensors(states[1]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def tensors(state):
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state
    return [
        t for part in parts if isinstance(part, (dict, list, torch.Tensor)) for t in tensors(part)
    ]


def test_a_step_that_is_not_finite_changes_nothing_but_the_count():
    trainer = make_trainer(**STILL)
    trainer.step(*make_batch())
    before = everything(trainer)
    source, labels, target = make_batch(1)
    source[0, 0, 0, 0] = float("nan")
    report = trainer.step(source, labels, target)
    assert report.item("skipped") == 1
    assert_same(everything(trainer), before)


def test_the_tensors_of_a_schedule_stay_where_they_are():
    trainer = make_trainer()
    first = trainer.prepare()
    trainer.steps = 3
    trainer.teacher.updates = 3
    second = trainer.prepare()
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert second.weight == 3.0
    assert second.threshold == torch.tensor(0.26)
    assert second.decay.dtype == torch.float64
    assert second.decay == trainer.teacher.current_decay()
    filled = OnDevice(torch.device("cpu"))
    assert filled.fill("limits", torch.ones(3)) is filled.fill("limits", torch.zeros(3))
    assert filled.fill("limits", 0.5).shape == ()
