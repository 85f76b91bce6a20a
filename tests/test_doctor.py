"""The doctor: what it finds where all is well, and where something is wrong."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from pathlib import Path

import pytest
import torch

import fastmt
from fastmt import cli, cpp_backend, selftest

CPU = torch.device("cpu")
built = pytest.mark.skipif(
    cpp_backend.missing() is not None, reason="the C++ kernels are not built"
)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", selftest.TOLERANCE)
@pytest.mark.parametrize("operation", selftest.PLAIN)
def test_every_operation_passes_its_self_test(operation, dtype):
    trial = selftest.PLAIN[operation](CPU, dtype, selftest.Sizes())
    assert trial.error() <= selftest.TOLERANCE[dtype]


@pytest.mark.parametrize("operation", selftest.PLAIN)
def test_a_self_test_notices_a_wrong_result(operation):
    trial = selftest.PLAIN[operation](CPU, torch.float32, selftest.Sizes())
    right = trial.expected()
    for i, tensor in enumerate(right):
        wrong = [t.clone() for t in right]
        wrong[i].view(-1)[-1] += 1 if not tensor.is_floating_point() else 1e-3 * tensor.abs().max()
        altered = dataclasses.replace(trial, expected=lambda wrong=wrong: wrong)
        assert altered.error() > selftest.TOLERANCE[torch.float32], i
    short = dataclasses.replace(trial, expected=lambda: [t.reshape(-1)[:-1] for t in right])
    assert not short.error() <= selftest.TOLERANCE[torch.float32]


@built
def test_the_report_tells_versions_devices_and_what_serves_each_operation_and_why():
    report = fastmt.doctor(timing=False)
    assert report.ok
    found = [f for f in report.findings if f.device == "cpu"]
    assert [f.operation for f in found] == list(selftest.PLAIN)
    assert {f.backend for f in found} == {"cpp"}
    assert {f.reason for f in found} == {
        f"C++ kernels ({cpp_backend.instruction_set()}) serve this call"
    }
    text = repr(report)
    assert report.versions["fastmt"].endswith(f" in {Path(fastmt.__file__).parent}")
    for word in (fastmt.__version__, torch.__version__, "triton", "compiler", *selftest.PLAIN):
        assert word in text
    assert report.findings[0].reason in text
    assert "FAILED" not in text


def test_what_was_built_is_told_without_the_figures_of_each_kernel(monkeypatch):
    cuda = {"built": True, "reason": "", "compiler": "nvcc 12.8", "resources": [{"registers": 64}]}
    record = {"cpp": True, "reason": "", "compiler": "c++ 12", "cuda": cuda}
    monkeypatch.setattr(cpp_backend, "build_info", lambda: record)
    monkeypatch.setattr(cpp_backend, "cuda_missing", lambda: "no CUDA device is available")
    build = fastmt.doctor(timing=False).build
    assert build["compiler"] == "c++ 12"
    assert build["CUDA compiler"] == "nvcc 12.8"
    assert build["CUDA kernels"] == "no CUDA device is available"
    assert "registers" not in str(build)


def test_a_backend_that_the_environment_asks_for_is_told(monkeypatch):
    monkeypatch.delenv("FASTMT_BACKEND", raising=False)
    assert "FASTMT_BACKEND" not in fastmt.doctor(timing=False).build
    monkeypatch.setenv("FASTMT_BACKEND", "eager")
    assert fastmt.doctor(timing=False).build["FASTMT_BACKEND"].startswith("eager, ")


@built
def test_kernels_are_timed_against_eager(monkeypatch):
    module = importlib.import_module("fastmt.doctor")
    monkeypatch.setattr(module, "TIMED", selftest.Sizes(1, 3, (4, 4), (8, 8)))
    for finding in fastmt.doctor().findings:
        assert finding.fused_s > 0
        assert finding.eager_s > 0


def test_without_kernels_the_reference_is_tested_and_the_reason_told(monkeypatch):
    reason = "the C++ kernels are not built: no compiler"
    monkeypatch.setattr(cpp_backend, "missing", lambda: reason)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a report says it; a warning besides would be noise
        report = fastmt.doctor()
    found = [f for f in report.findings if f.device == "cpu"]
    assert report.ok
    assert {(f.backend, f.reason, f.fused_s) for f in found} == {("eager", reason, None)}
    assert reason in repr(report)


def test_a_failing_self_test_is_told_and_sets_the_exit_status(monkeypatch, capsys):
    assert cli.main(["doctor", "--no-timing"]) == 0
    assert "FAILED" not in capsys.readouterr().out
    monkeypatch.setitem(selftest.TOLERANCE, torch.bfloat16, 0.0)
    assert cli.main(["doctor", "--no-timing"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: consistency_loss on cpu" in out
    assert "bfloat16: error above 0" in out


def test_an_operation_that_raises_is_a_finding_and_not_the_end(monkeypatch):
    def broken(*arguments):
        trial = selftest.consistency(*arguments)

        def raises():
            raise RuntimeError("no such\nkernel")

        return dataclasses.replace(trial, expected=raises)

    monkeypatch.setitem(selftest.PLAIN, "consistency_loss", broken)
    report = fastmt.doctor(timing=False)
    assert [f.operation for f in report.findings if f.failure] == ["consistency_loss"]
    assert report.findings[0].failure == "RuntimeError: no such"
    assert not report.ok


def test_a_report_that_finds_no_room_names_no_option_that_there_is_not(capfd, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importlib.import_module("fastmt.doctor"), "doctor", full)
    assert cli.main(["doctor"]) == 2
    assert capfd.readouterr().err == "fastmt doctor: error: stdout: No space left on device\n"
