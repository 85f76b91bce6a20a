"""The host's part of replaying a step as a graph."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from test_capturable import OPTIONS, make_trainer
from training import Net, Stateful, assert_same, everything, make_batch

from fastmt import captured
from fastmt.trainer import MeanTeacher


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
