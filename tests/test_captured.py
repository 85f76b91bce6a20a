"""A trainer whose step never reads a tensor, and the host's part of replaying it as a graph."""

from __future__ import annotations

import contextlib
import copy
import gc
import sys
import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training import STILL, Net, Stateful, assert_same, everything, make_batch

from fastmt import captured, decays, perturb
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


class Replayed(captured.CapturedStep):
    """A step whose graph is the computation itself, as there is no GPU to record one."""

    _device_type = "cpu"

    def _warm_up(self):
        return self.trainer.step(*self._batch)

    def _record(self):
        return self._compute


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_replayed_steps_go_on_by_every_schedule(options):
    trainers = [make_trainer(rate=torch.tensor(0.1), **options) for _ in range(2)]
    for trainer in trainers:
        trainer.scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.5)
    captured_step = Replayed(trainers[0], warmup=2)
    for seed in range(5):
        report = captured_step(*make_batch(seed))
        expected = trainers[1].step(*make_batch(seed))
        assert report.as_dict() == expected.as_dict()
        assert trainers[0].teacher.updates == trainers[1].teacher.updates == seed + 1
    assert_same(*map(everything, trainers))


def test_a_replayed_step_calls_each_schedule_once_and_reports_what_it_trained_with():
    schedules = weight, threshold, decay = Stateful(0.5), Stateful(0.01), Stateful(0.1)
    trainer = make_trainer(weight=weight, threshold=threshold)
    trainer.teacher.decay = decay
    step = Replayed(trainer, warmup=1)
    for n in range(1, 5):  # the second is captured
        report = step(*make_batch())
        assert [len(schedule.given) for schedule in schedules] == [n] * 3
        assert (report.weight, report.threshold) == (weight.given[-1], threshold.given[-1])
        expected = report.supervised + report.weight * report.consistency
        torch.testing.assert_close(report.loss, expected)


def test_what_a_step_reports_is_not_overwritten_by_the_next():
    step = Replayed(make_trainer(), warmup=1)
    reports = [step(*make_batch(seed)) for seed in range(4)]
    assert len({report.item("loss") for report in reports}) == 4


def test_a_batch_that_does_not_fit_the_capture_is_named():
    step = Replayed(make_trainer(), warmup=1)
    for count in (4, 2):  # the second is captured
        step(*make_batch(count=count))
    with pytest.raises(ValueError, match=r"^source_images: got torch.float32 \(4, 3, 12, 16\)"):
        step(*make_batch(count=4))
    source, labels, target = make_batch()
    with pytest.raises(ValueError, match="^source_labels: got torch.int64"):
        step(source, labels.long(), target)


def test_a_first_batch_on_another_device_is_refused_alone():
    step = Replayed(make_trainer(), warmup=1)
    with pytest.raises(ValueError, match="^source_images: got images on meta"):
        step(*(tensor.to("meta") for tensor in make_batch()))
    assert step(*make_batch()).item("loss") > 0


def test_a_batch_that_is_refused_is_not_counted():
    trainer = make_trainer()
    step = Replayed(trainer, warmup=1)
    for _ in range(3):
        step(*make_batch())
    with pytest.raises(ValueError, match="^source_images: got"):
        step(*make_batch(count=4))
    assert (trainer.teacher.calls, trainer.teacher.updates, trainer.steps) == (3, 3, 3)


class Kept(Replayed):
    """Counts its captures."""

    captures = 0

    def _record(self):
        self.captures += 1
        return super()._record()


@pytest.mark.parametrize("loaded", ["trainer", "teacher", "optimizer"])
def test_a_state_that_is_loaded_is_captured_anew(tmp_path, loaded):
    trainers = [make_trainer(rate=torch.tensor(0.1)) for _ in range(2)]
    step = Kept(trainers[0], warmup=1)
    for seed in range(3):
        step(*make_batch(seed))
        trainers[1].step(*make_batch(seed))
    assert step.captures == 1
    for trainer in trainers:
        if loaded == "trainer":
            trainer.save(tmp_path / "run.pt")
            trainer.resume(tmp_path / "run.pt")
        else:
            part = getattr(trainer, loaded)
            part.load_state_dict(copy.deepcopy(part.state_dict()))
    for seed in range(3):
        expected = trainers[1].step(*make_batch(seed))
        assert step(*make_batch(seed)).as_dict() == expected.as_dict()
    assert step.captures == 2
    assert_same(*map(everything, trainers))


def test_what_a_capture_reads_outlives_the_state_that_replaces_it(tmp_path):
    trainer = make_trainer()
    step = Replayed(trainer, warmup=1)
    for seed in range(2):
        step(*make_batch(seed))
    plan = weakref.ref(trainer.teacher._plan)
    moments = weakref.ref(next(iter(trainer.optimizer.state.values()))["exp_avg"])
    trainer.save(tmp_path / "run.pt")
    trainer.resume(tmp_path / "run.pt")
    gc.collect()
    assert plan() is not None and moments() is not None
    step(*make_batch())
    gc.collect()
    assert plan() is None and moments() is None


def test_warm_up_and_capture_read_the_same_memory_so_that_a_capture_compiles_nothing_new():
    step, read = Replayed(make_trainer(), warmup=2), set()
    for seed in range(4):
        step(*make_batch(seed))
        read.add(tuple(tensor.data_ptr() for tensor in step._batch))
    assert len(read) == 1


def test_other_threads_may_allocate_during_a_capture(monkeypatch):
    class Graph:
        def register_generator_state(self, generator):
            pass

        def replay(self):
            pass

    asked = {}

    def capturing(graph, **options):
        asked.update(options)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    step = Replayed(make_trainer(), warmup=1)
    step(*make_batch())
    step._now = step.trainer.prepare()
    captured.CapturedStep._record(step)
    assert asked["capture_error_mode"] == "thread_local"


def test_a_capture_that_fails_counts_no_step():
    class OutOfMemory(Replayed):
        def _record(self):
            self._compute()
            raise torch.OutOfMemoryError

    trainer = make_trainer()
    step = OutOfMemory(trainer, warmup=1)
    step(*make_batch())
    with pytest.raises(torch.OutOfMemoryError):
        step(*make_batch())
    assert (trainer.teacher.calls, trainer.teacher.updates, trainer.steps) == (1, 1, 1)


def test_a_threshold_of_another_shape_is_refused():
    step = Replayed(make_trainer(threshold=lambda t: 0.1 if t < 2 else torch.ones(4)), warmup=1)
    for _ in range(2):
        step(*make_batch())
    with pytest.raises(ValueError, match="^threshold: got another tensor than in the capture"):
        step(*make_batch())


def test_a_trainer_that_a_graph_cannot_hold_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="^optimizer: Adam without fused=True"):
        student = Net()
        MeanTeacher(student, torch.optim.Adam(student.parameters()), capturable=True)
    with pytest.raises(ValueError, match="^class_mixing: got 0.5, expected 0 or 1"):
        make_trainer(class_mixing=0.5)
    with pytest.raises(ValueError, match="^trainer: got one with capturable=False"):
        captured.CapturedStep(make_trainer(capturable=False))
    with pytest.raises(ValueError, match="^trainer: its student is on cpu, expected a GPU"):
        captured.CapturedStep(make_trainer())
    with pytest.raises(ValueError, match="^warmup: got 0"):
        Replayed(make_trainer(), warmup=0)
    trainer = make_trainer()
    trainer.teacher.update_every = 2
    with pytest.raises(ValueError, match="update_every=2, expected 1"):
        Replayed(trainer)
    trainer = make_trainer()
    trainer.scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.5)
    with pytest.raises(ValueError, match="a learning rate that is a float"):
        Replayed(trainer)
    trainer = make_trainer()
    trainer.optimizer.param_groups[0]["capturable"] = False
    with pytest.raises(ValueError, match="Adam has capturable=False, expected one made with"):
        Replayed(trainer)
