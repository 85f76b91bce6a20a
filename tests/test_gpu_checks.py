"""What a GPU is checked for, as far as it goes without one: the checks hold, and notice faults."""

from __future__ import annotations

import pytest
import torch
from test_captured import Replayed

import fastmt
from benchmarks import gpu_checks
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
