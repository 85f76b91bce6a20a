"""What a GPU is checked for, as far as it goes without one: the checks hold, and notice faults."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_captured import Replayed

import fastmt
from benchmarks import gpu_checks
from benchmarks.shapes import Shape
from fastmt import cpp_backend, selftest

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
needs_kernels = pytest.mark.skipif(cpp_backend.missing() is not None, reason="compares the kernels")


@pytest.mark.parametrize("name", gpu_checks.trials())
def test_every_trial_of_the_gpu_checks_holds_on_a_cpu(name):
    build, dtypes = gpu_checks.trials()[name]
    for dtype in dtypes:
        for backend in gpu_checks.serving(build, CPU):
            gpu_checks.is_right(build, dtype, backend, CPU)


@needs_kernels
def test_a_check_of_an_operation_fails_where_the_result_is_wrong(monkeypatch):
    monkeypatch.setitem(selftest.TOLERANCE, torch.float32, 1e-12)
    with pytest.raises(AssertionError, match="error .* of the largest value"):
        gpu_checks.is_right(selftest.consistency, torch.float32, "cpp", CPU)
    monkeypatch.setitem(selftest.TOLERANCE, torch.float32, 1e-5)
    runs = iter(range(10))
    noisy = fastmt.cross_entropy

    def drifts(logits, labels, **options):
        return noisy(logits * (1 + 1e-7 * next(runs)), labels, **options)

    monkeypatch.setattr(selftest, "cross_entropy", drifts)
    with pytest.raises(AssertionError, match="two runs differ"):
        gpu_checks.is_right(selftest.labelled, torch.float32, "cpp", CPU)


def test_the_checks_hold_every_operation_and_the_behaviour_of_a_gpu():
    names = list(gpu_checks.checks(CPU))
    for operation in selftest.PLAIN:
        assert sum(name.startswith(f"{operation}, ") for name in names) >= 3
    assert {check.__name__ for check in gpu_checks.BEHAVIOUR} <= set(names)


def test_a_captured_loss_leaves_no_graph_on_the_stream_of_its_capture(monkeypatch):
    computed = []

    def computes(compute, device):
        computed.extend(compute())
        raise StopIteration

    monkeypatch.setattr(gpu_checks, "_on_a_side_stream", computes)
    with pytest.raises(StopIteration):
        gpu_checks.a_captured_loss_follows_threshold_weight_and_decay(CPU)
    assert len(computed) == 2 and not [t for t in computed if t.requires_grad]


def test_waiting_is_an_error_without_a_word_about_prototypes(monkeypatch, recwarn):
    modes = []

    def set_mode(mode):
        modes.append(mode)
        if mode == "error":
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with gpu_checks.waiting_is_an_error(CPU):
        assert modes == ["error"] and not recwarn.list
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in recwarn.list] == ["another"]


def test_the_check_of_replays_takes_no_gradient_that_a_gpu_sums_in_any_order():
    trainer = gpu_checks.make_trainer(CPU, amp=torch.bfloat16)
    with torch.profiler.profile() as profile:
        trainer.step(*gpu_checks.batch(CPU, 0))
    names = {event.name for event in profile.events()}
    assert any("convolution_backward" in name for name in names)
    assert not [name for name in names if "upsample" in name]


def test_the_check_of_replays_notices_a_schedule_that_stands_still(monkeypatch):
    monkeypatch.setattr(fastmt, "CapturedStep", Replayed)
    gpu_checks.a_replayed_step_is_the_step(CPU)

    class Frozen(Replayed):
        """Replays with what held at the capture, as a graph with numbers in it would."""

        def _check_numbers(self, now):
            super()._check_numbers(now)
            now.weight.fill_(0.5)

    monkeypatch.setattr(fastmt, "CapturedStep", Frozen)
    with pytest.raises(AssertionError):
        gpu_checks.a_replayed_step_is_the_step(CPU)


def test_sums_that_differ_from_call_to_call_are_noticed(monkeypatch):
    check = gpu_checks.sums_of_many_programs_are_the_same_whichever_is_the_last
    monkeypatch.setattr(gpu_checks, "Shape", lambda n, c, size: Shape(2, c, (16, 16)))
    check(CPU)
    values = iter(range(1000))
    exact = fastmt.consistency_loss

    def drifts(student, teacher, **options):
        return exact(student, teacher, **options) + 1e-8 * (next(values) % 7)

    monkeypatch.setattr(fastmt, "consistency_loss", drifts)
    with pytest.raises(AssertionError):
        check(CPU)
