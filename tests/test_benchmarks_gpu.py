"""The GPU benchmark as far as it goes without one: refusals, failures, and time that runs out."""

from __future__ import annotations

import dataclasses
import json

import gpu_results
import pytest
import torch

from benchmarks import gpu, gpu_cases, gpu_checks, gpu_report, harness, machine
from fastmt import cpp_backend

CPU = torch.device("cpu")
SOME_CASE = gpu_cases.cases("tiny")[0]
pytestmark = pytest.mark.usefixtures("one_thread")
needs_kernels = pytest.mark.skipif(cpp_backend.missing() is not None, reason="compares the kernels")


@pytest.fixture
def no_gpu_needed(monkeypatch):
    gpu_results.without_a_gpu(monkeypatch)


def test_a_failing_check_is_told_in_a_line_and_the_others_still_run(capsys):
    def fails(device):
        raise RuntimeError("lost\nin detail")

    results = gpu.verify({"first": fails, "second": lambda device: None}, CPU)
    assert results == {"first": "RuntimeError: lost", "second": None}
    assert capsys.readouterr().err == "FAILED first: RuntimeError: lost\n"


def test_a_check_that_never_ends_is_named_in_what_was_saved(no_gpu_needed, monkeypatch):
    def hangs(device):
        raise KeyboardInterrupt

    checks = {"one": lambda device: None, "two": hangs}
    monkeypatch.setattr(gpu_checks, "checks", lambda device: checks)
    saved = []
    with pytest.raises(KeyboardInterrupt):
        gpu_results.run(save=lambda result: saved.append(json.dumps(result)))
    assert json.loads(saved[-1])["checks"] == {"one": None, "two": "did not end"}


def test_after_a_fault_of_the_gpu_everything_says_so_and_what_was_measured_is_written(
    no_gpu_needed, monkeypatch
):
    def faulty(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    cases = [harness.Case(name, "dense", None, compiled=True) for name in ("one", "two")]
    measured = {"one": lambda: gpu_results.case("one", "dense", {"triton": 1e-3}), "two": faulty}
    monkeypatch.setattr(gpu_cases, "cases", lambda: cases)
    monkeypatch.setattr(gpu, "measure", lambda case, *_, **__: measured[case.name]())
    monkeypatch.setattr(gpu_checks, "checks", faulty)
    written = []
    result = gpu_results.run(with_compile=True, write=written.append)
    assert written[-1] is result
    assert [case["name"] for case in result["cases"]] == ["one"]
    for told in (result["left_out"]["two"], *result["checks"].values()):
        assert told == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert gpu.exit_status(result) == 1


def test_a_red_check_is_told_and_leaves_the_times(no_gpu_needed, monkeypatch):
    def fails(device):
        raise AssertionError("wrong")

    monkeypatch.setattr(gpu_checks, "checks", lambda device: {"an option": fails})
    begun = []
    monkeypatch.setattr(gpu_cases, "cases", lambda: begun.append(True) or [])
    result = gpu_results.run()
    assert begun
    assert gpu.exit_status(result) == 1
    text = gpu_report.markdown(result)
    assert "0 of 1 checks passed" in text
    assert "FAILED an option: AssertionError: wrong" in text


@needs_kernels
@pytest.mark.parametrize("case", gpu_cases.cases("tiny"), ids=lambda case: case.name)
def test_every_case_measures_each_backend_that_serves_it(case):
    measured = gpu.measure(
        case, CPU, with_compile=False, rounds=2, sample_seconds=0, copy_bytes=1 << 16
    )
    assert measured["variants"].keys() == {"eager", "cpp"}
    assert measured["auto"] == "cpp"
    assert "triton" in measured["left_out"]
    for variant in measured["variants"].values():
        seconds = variant[measured["counts"]]
        assert seconds == variant["device_s"] == variant["call_s"]  # on a CPU they are one
        assert variant["samples"]["device_s"] == variant["samples"]["call_s"]
        assert variant["gb_per_s"] == pytest.approx(measured["bytes"] / seconds / 1e9)
        share = variant["gb_per_s"] / measured["copy_gb_per_s"]
        assert variant["of_copy"] == pytest.approx(share)
        assert variant["error"] <= 1.6e-2
    assert measured["counts"] == ("call_s" if case.group == "small" else "device_s")
    json.dumps(measured)


@needs_kernels
def test_a_variant_that_is_wrong_or_fails_is_not_timed_and_the_others_are(capsys):
    case = SOME_CASE

    def fails():
        raise RuntimeError("out of resource\nin detail")

    def build(device, compiled):
        work = case.build(device, compiled)
        other = {"triton": lambda: [2 * t for t in work.variants["cpp"]()], "third": fails}
        return dataclasses.replace(work, variants=work.variants | other)

    broken = dataclasses.replace(case, build=build)
    options = {"rounds": 1, "sample_seconds": 0, "copy_bytes": 1 << 16}
    measured = gpu.measure(broken, CPU, with_compile=False, **options)
    assert measured["variants"].keys() == {"eager", "cpp"}
    assert measured["left_out"]["triton"].startswith("WrongResult: triton: error 1")
    assert measured["left_out"]["third"] == "RuntimeError: out of resource"
    assert "FAILED third: RuntimeError: out of resource" in capsys.readouterr().err
    assert gpu.exit_status({"checks": {}, "left_out": {}, "cases": [measured]}) == 1


@needs_kernels
def test_a_case_in_which_no_variant_is_right_is_left_out(no_gpu_needed, monkeypatch):
    case = SOME_CASE

    def build(device, compiled):
        work = case.build(device, compiled)
        return dataclasses.replace(work, tolerance=-1.0)

    monkeypatch.setattr(gpu_cases, "cases", lambda: [dataclasses.replace(case, build=build)])
    result = gpu_results.run()
    assert result["cases"] == []
    assert result["left_out"][case.name].startswith("WrongResult: cpp: error")


def test_a_wrong_result_is_left_out_and_sets_the_exit_status(no_gpu_needed, monkeypatch):
    def wrong(device, compiled):
        raise harness.WrongResult("triton: error 0.5 of the largest value; not timed")

    monkeypatch.setattr(gpu_cases, "cases", lambda: [harness.Case("bad", "dense", wrong)])
    result = gpu_results.run()
    assert result["left_out"]["bad"].startswith("WrongResult: triton: error 0.5")
    assert gpu.exit_status(result) == 1
    assert "- bad: WrongResult: triton: error 0.5" in gpu_report.markdown(result)


@pytest.mark.parametrize("error", [Exception("out of resource"), RuntimeError("lost")])
def test_a_case_that_fails_is_left_out_and_the_others_are_measured(
    error, no_gpu_needed, monkeypatch
):
    def fails(device, compiled):
        raise error

    cases = [harness.Case("bad", "dense", fails), harness.Case("good", "dense", None)]
    measure = gpu.measure
    monkeypatch.setattr(gpu_cases, "cases", lambda: cases)
    monkeypatch.setattr(
        gpu,
        "measure",
        lambda case, *a, **o: (
            measure(case, *a, **o)
            if case.build
            else gpu_results.case(case.name, "dense", {"triton": 1e-3})
        ),
    )
    result = gpu_results.run()
    assert result["left_out"] == {"bad": f"{type(error).__name__}: {error}"}
    assert [case["name"] for case in result["cases"]] == ["good"]


def test_a_fault_that_every_later_call_raises_ends_no_run(no_gpu_needed, monkeypatch):
    def fault():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_cases, "cases", lambda: [harness.Case("after", "dense", None)])
    monkeypatch.setattr(torch.cuda, "empty_cache", fault)
    assert gpu_results.run()["left_out"]["after"].startswith("RuntimeError: CUDA error: an illegal")


def test_each_step_leaves_whole_files_behind(no_gpu_needed, monkeypatch, tmp_path):
    cases = [harness.Case(name, "dense", None) for name in ("first", "killed")]
    monkeypatch.setattr(gpu_cases, "cases", lambda: cases)
    monkeypatch.setattr(machine, "no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def measured(case, *_, **__):
        if case.name == "killed":
            raise KeyboardInterrupt
        return gpu_results.case(case.name, "dense", {"triton": 1e-3}, None)

    monkeypatch.setattr(gpu, "measure", measured)
    monkeypatch.setattr(machine, "record", lambda device: gpu_results.result())
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--out", str(tmp_path), "--no-compile"])
    assert [c["name"] for c in json.loads((tmp_path / "gpu.json").read_text())["cases"]] == [
        "first"
    ]
    assert "| first | triton * | 1.00 ms |" in (tmp_path / "gpu.md").read_text()


def test_without_a_gpu_it_ends_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "none")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks.gpu: error: no GPU: ")
    assert not (tmp_path / "none").exists()
