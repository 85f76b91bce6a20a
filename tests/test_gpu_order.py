"""The order of a run of the GPU benchmark, and what it leaves when its time is over."""

from __future__ import annotations

import json
import subprocess
import sys

import gpu_results
import pytest

from benchmarks import gpu, gpu_cases, gpu_checks, harness


@pytest.fixture
def no_gpu_needed(monkeypatch):
    gpu_results.without_a_gpu(monkeypatch)


def test_a_run_that_hangs_ends_and_tells_where(tmp_path):
    program = f"""
import time, torch
from benchmarks import gpu, machine
machine.no_gpu, torch.cuda.current_device = lambda: None, lambda: 0
gpu._MINUTES_TO_END = 0.01
gpu.run = lambda *_, **__: time.sleep(60)
gpu.main(["--out", {str(tmp_path)!r}, "--minutes", "0"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in main" in done.stderr


def test_cases_for_which_no_time_is_left_are_named(no_gpu_needed, monkeypatch):
    monkeypatch.setattr(gpu_cases, "cases", lambda: [harness.Case("late", "dense", None)])
    result = gpu_results.run(clock=gpu.Clock(0))
    assert result["left_out"].pop("1 of 1 checks").startswith("no time was left for them")
    assert result["left_out"] == {"late": "the 0 minutes are over"}
    assert gpu.exit_status(result) == 0


@pytest.mark.parametrize(
    ("with_compile", "seconds", "begun"),
    [(True, 220, 8), (True, 165, 4), (True, 120, 6), (False, 120, 6)],
    ids=["half", "enough for one case", "none, as that is not left", "none"],
)
def test_checks_come_after_the_times_and_leave_torch_compile_time_for_a_case(
    with_compile, seconds, begun, no_gpu_needed, monkeypatch
):
    clock, left, order = gpu.Clock(seconds / 60), [float(seconds)], []
    monkeypatch.setattr(clock, "left", lambda: left[0])

    def takes(name, seconds):
        order.append(name)
        left[0] -= seconds
        return gpu_results.case("case", "dense", {"triton": 1e-3})

    checks = {f"check {i}": lambda device: takes("check", 10) for i in range(9)}
    monkeypatch.setattr(gpu_checks, "checks", lambda device: checks)
    monkeypatch.setattr(gpu_cases, "cases", lambda: [harness.Case("case", "dense", None)])
    monkeypatch.setattr(gpu, "measure", lambda *_, **__: takes("case", 60))
    result = gpu_results.run(clock=clock, with_compile=with_compile)
    assert order == ["case", *["check"] * begun]
    assert len(result["checks"]) == begun
    assert [*result["left_out"]] == [f"{9 - begun} of 9 checks"]


def test_what_is_saved_is_plotted_before_and_after_each_case_with_torch_compile(
    no_gpu_needed, monkeypatch
):
    cases = [harness.Case(name, "dense", None, compiled=True) for name in ("one", "two")]
    monkeypatch.setattr(gpu_cases, "cases", lambda: cases)

    def measured(case, device, *, with_compile):
        compile_s = 2e-3 if with_compile else None
        return gpu_results.case(case.name, "dense", {"triton": 1e-3}, compile_s)

    monkeypatch.setattr(gpu, "measure", measured)
    plotted = []

    def write(result):
        plotted.append(sum("torch.compile" in case["variants"] for case in result["cases"]))

    gpu_results.run(with_compile=True, write=write)
    assert plotted == [0, 1, 2, 2]


def test_a_case_that_never_ends_is_named_in_what_was_saved(no_gpu_needed, monkeypatch):
    cases = [harness.Case(name, "dense", None, compiled=True) for name in ("one", "two")]
    monkeypatch.setattr(gpu_cases, "cases", lambda: cases)

    def measured(case, device, *, with_compile):
        if with_compile and case.name == "two":
            raise KeyboardInterrupt
        return gpu_results.case(case.name, "dense", {"triton": 1e-3})

    monkeypatch.setattr(gpu, "measure", measured)
    saved = []
    with pytest.raises(KeyboardInterrupt):
        gpu_results.run(with_compile=True, save=lambda result: saved.append(json.dumps(result)))
    last = json.loads(saved[-1])
    assert [case["name"] for case in last["cases"]] == ["one", "two"]
    assert last["left_out"] == {"two, torch.compile": "did not end"}


def test_torch_compile_is_left_out_first_when_time_runs_short(no_gpu_needed, monkeypatch):
    names = [f"case {i}" for i in range(4)]
    cases = [harness.Case(name, "dense", None, compiled=True) for name in names]
    monkeypatch.setattr(gpu_cases, "cases", lambda: cases)
    clock, asked = gpu.Clock(3), []
    left = [180.0]
    monkeypatch.setattr(clock, "left", lambda: left[0])

    def measured(case, device, *, with_compile):
        asked.append((case.name, with_compile))
        left[0] -= 56 if with_compile else 5
        compile_s = 2e-3 if with_compile else None
        return gpu_results.case(case.name, "dense", {"triton": 1e-3}, compile_s)

    monkeypatch.setattr(gpu, "measure", measured)
    result = gpu_results.run(clock=clock, with_compile=True)
    # With 160, 104 and 48 seconds left for torch.compile, which needs 60, or 70 after the first.
    assert asked == [*((name, False) for name in names), *((name, True) for name in names[:2])]
    assert [case["name"] for case in result["cases"]] == names
    compiled = ["torch.compile" in case["variants"] for case in result["cases"]]
    assert compiled == [True, True, False, False]
    late = {f"{name}, torch.compile": "the 3 minutes are over" for name in names[2:]}
    assert result["left_out"] == late


def test_what_is_measured_again_with_torch_compile_takes_nothing_away(no_gpu_needed, monkeypatch):
    names = ["lost", "fails", "good"]
    cases = [harness.Case(name, "dense", None, compiled=True) for name in names]
    monkeypatch.setattr(gpu_cases, "cases", lambda: cases)

    def measured(case, device, *, with_compile):
        if with_compile and case.name == "fails":
            raise RuntimeError("no compiler")
        lost = with_compile and case.name == "lost"
        fused, left_out = ({}, {"triton": "WrongResult: off"}) if lost else ({"triton": 1e-3}, {})
        compile_s = 2e-3 if with_compile else None
        return gpu_results.case(case.name, "dense", fused, compile_s, left_out)

    monkeypatch.setattr(gpu, "measure", measured)
    result = gpu_results.run(with_compile=True)
    assert result["left_out"] == {
        "lost, torch.compile": "WrongResult: off",
        "fails, torch.compile": "RuntimeError: no compiler",
    }
    assert [[*case["variants"]] for case in result["cases"]] == [
        ["eager", "triton"],
        ["eager", "triton"],
        ["eager", "torch.compile", "triton"],
    ]
    assert gpu.exit_status(result) == 1
