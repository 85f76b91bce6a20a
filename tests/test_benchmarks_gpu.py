"""The GPU benchmark as far as it goes without one: refusals, byte models, table, plot."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import fastmt
from benchmarks import gpu, gpu_cases, gpu_checks, gpu_report, harness, machine
from fastmt import cpp_backend

CPU = torch.device("cpu")
SOME_CASE = gpu_cases.cases("tiny")[0]
pytestmark = pytest.mark.usefixtures("one_thread")
needs_kernels = pytest.mark.skipif(cpp_backend.missing() is not None, reason="compares the kernels")


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """The parts of a run that ask a GPU, answered for a CPU; and no case or check of its own."""
    monkeypatch.setattr(machine, "gpu", lambda device: {"capability": "9.0"})
    monkeypatch.setattr(gpu_checks, "checks", lambda device: {"one": lambda device: None})
    monkeypatch.setattr(gpu_cases, "cases", list)


def run(**options):
    options = {"only": "", "with_compile": False, "save": lambda result: None, **options}
    return gpu.run(CPU, options.pop("clock", gpu.Clock(8)), **options)


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
        run(save=lambda result: saved.append(json.dumps(result)))
    assert json.loads(saved[-1])["checks"] == {"one": None, "two": "did not end"}


def test_a_run_that_hangs_ends_and_tells_where(tmp_path):
    program = f"""
import time, torch
from benchmarks import gpu, gpu_report
gpu.no_gpu, torch.cuda.current_device = lambda: None, lambda: 0
gpu._MINUTES_TO_END = 0.01
gpu.run = lambda *_, **__: time.sleep(60)
gpu.main(["--out", {str(tmp_path)!r}, "--minutes", "0"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in main" in done.stderr


def test_a_red_check_is_told_and_leaves_the_times(no_gpu_needed, monkeypatch):
    def fails(device):
        raise AssertionError("wrong")

    monkeypatch.setattr(gpu_checks, "checks", lambda device: {"an option": fails})
    begun = []
    monkeypatch.setattr(gpu_cases, "cases", lambda: begun.append(True) or [])
    result = run()
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
        assert variant["gb_per_s"] == pytest.approx(measured["bytes"] / variant["median_s"] / 1e9)
        share = variant["gb_per_s"] / measured["copy_gb_per_s"]
        assert variant["of_copy"] == pytest.approx(share)
        assert variant["error"] <= 1.6e-2
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
    result = run()
    assert result["cases"] == []
    assert result["left_out"][case.name].startswith("WrongResult: cpp: error")


def test_the_bytes_of_each_case_are_those_that_have_to_move():
    pixels, low = 2 * 16 * 24, 2 * 5 * (16 // 8) * (24 // 8)
    of_case = {
        "consistency 2x5x16x24 bfloat16": 3 * 2 * 5 * pixels,
        "consistency 2x5x16x24 float32": 3 * 4 * 5 * pixels,
        "confidence 2x5x16x24 bfloat16": (2 * 5 + 12) * pixels,
        "confidence 2x5x16x24 float32": (4 * 5 + 12) * pixels,
        "consistency 2x5x16x24 float32 from 1/8": 3 * 4 * low,
        "confidence 2x5x16x24 float32 from 1/8": 4 * low + 12 * pixels,
        "cross-entropy 2x5x16x24 float32 from 1/4": 2 * 4 * (4 * low) + 8 * pixels,
        "cross-entropy 2x5x16x24 float32": (2 * 4 * 5 + 8) * pixels,
        "EMA of 0 M in 5 tensors, float32 student": 12 * 5 * 21,
        "EMA of 0 M in 5 tensors, bfloat16 student": 10 * 5 * 21,
    }
    cases = gpu_cases.cases("tiny")
    assert {case.name for case in cases} == of_case.keys()
    for case in cases:
        assert case.build(CPU, False).bytes == of_case[case.name], case.name


def test_the_real_cases_have_the_sizes_of_their_names():
    names = [case.name for case in gpu_cases.cases()]
    assert len(names) == len(set(names)) == 15
    assert "consistency 8x19x1024x1024 float32 from 1/8" in names
    assert "EMA of 304 M in 296 tensors, float32 student" in names
    assert "EMA of 1 M in 1000 tensors, float32 student" in names


def test_calls_turn_through_more_memory_than_the_cache_holds():
    assert gpu_cases.sets_for(1 << 30, 50 << 20) == 1
    assert gpu_cases.sets_for(1 << 20, 50 << 20) == 100
    assert gpu_cases.sets_for(1, 50 << 20) == 512
    seen = []
    sets = [[torch.tensor(float(i))] for i in range(3)]
    call = gpu_cases._turning(lambda tensor: seen.append(int(tensor)), sets)
    for _ in range(7):
        call()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_a_wrong_result_is_left_out_and_sets_the_exit_status(no_gpu_needed, monkeypatch):
    def wrong(device, compiled):
        raise harness.WrongResult("triton: error 0.5 of the largest value; not timed")

    monkeypatch.setattr(gpu_cases, "cases", lambda: [harness.Case("bad", "dense", wrong)])
    result = run()
    assert result["left_out"]["bad"].startswith("WrongResult: triton: error 0.5")
    assert gpu.exit_status(result) == 1
    assert "- bad: WrongResult: triton: error 0.5" in gpu_report.markdown(result)


def test_cases_for_which_no_time_is_left_are_named(no_gpu_needed, monkeypatch):
    monkeypatch.setattr(gpu_cases, "cases", lambda: [harness.Case("late", "dense", None)])
    result = run(clock=gpu.Clock(0))
    assert result["left_out"] == {"late": "the 0 minutes are over"}
    assert gpu.exit_status(result) == 0


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
            measure(case, *a, **o) if case.build else fake(case.name, "dense", {"triton": 1e-3})
        ),
    )
    result = run()
    assert result["left_out"] == {"bad": f"{type(error).__name__}: {error}"}
    assert [case["name"] for case in result["cases"]] == ["good"]


def test_torch_compile_is_left_out_first_when_time_runs_short(no_gpu_needed, monkeypatch):
    names = [f"case {i}" for i in range(4)]
    cases = [harness.Case(name, "dense", None, compiled=True) for name in names]
    monkeypatch.setattr(gpu_cases, "cases", lambda: cases)
    clock, asked = gpu.Clock(3), []
    left = [180.0]
    monkeypatch.setattr(clock, "left", lambda: left[0])

    def measured(case, device, *, with_compile):
        asked.append((case.name, with_compile))
        left[0] -= 45 if with_compile else 5
        return fake(case.name, "dense", {"triton": 1e-3}, 2e-3 if with_compile else None)

    monkeypatch.setattr(gpu, "measure", measured)
    result = run(clock=clock, with_compile=True)  # 160 s for torch.compile, none below 90
    assert asked == [*((name, False) for name in names), *((name, True) for name in names[:2])]
    assert [case["name"] for case in result["cases"]] == names
    compiled = ["torch.compile" in case["variants"] for case in result["cases"]]
    assert compiled == [True, True, False, False]
    late = {f"{name}, torch.compile": "the 3 minutes are over" for name in names[2:]}
    assert result["left_out"] == late


def fake(name, group, fused, compile_s=2e-3, left_out=None):
    def variant(seconds, launches):
        return {
            "median_s": seconds,
            "gb_per_s": 1 / seconds,
            "of_copy": 1e-3 / seconds,
            "launches": launches,
            "peak_extra_bytes": 5_000_000,
            "error": 1e-7,
            "samples_s": [seconds],
        }

    times = {"eager": 1e-2, "torch.compile": compile_s, **fused}
    return {
        "name": name,
        "group": group,
        "auto": "triton",
        "reasons": {},
        "left_out": left_out or {},
        "bytes": 10**9,
        "copy_gb_per_s": 1000.0,
        "variants": {n: variant(s, 3) for n, s in times.items() if s is not None},
    }


def test_table_json_and_plot_are_made_from_results(no_gpu_needed, tmp_path):
    result = run()
    result["cases"] = [
        fake("consistency", "dense", {"triton": 1e-3, "cpp": 1.25e-3}),
        fake("confidence", "dense", {"triton": 5e-4}, None, {"cpp": "no CUDA kernel"}),
        fake("EMA", "moving average", {"triton": 9e-7}, None),
    ]
    gpu_report.write(result, tmp_path)
    text = (tmp_path / "gpu.md").read_text()
    assert "1 of 1 checks passed." in text
    row = "| consistency | triton * | 1.00 ms | 1000 | 100% | 10.0 x | 2.0 x | 5.0 MB | 3 |"
    assert row in text
    assert "| consistency | cpp | 1.25 ms | 800 | 80% | 8.0 x | 1.6 x | 5.0 MB | 3 |" in text
    assert "| confidence | triton * | 500.0 us | 2000 | 200% | 20.0 x | - | 5.0 MB | 3 |" in text
    assert "- cpp: no CUDA kernel (confidence)" in text
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert json.loads(json.dumps(result)) == result


def test_without_a_gpu_it_ends_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "none")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks.gpu: error: no GPU: ")
    assert not (tmp_path / "none").exists()


def test_rounding_decides_about_no_pixel_of_the_large_up_sampled_case():
    (case,) = [c for c in gpu_cases.cases() if c.group == "up-sampled" and "consist" in c.name]
    _, teacher, options = case.build(CPU, False).expected.args
    images = {image.numpy().tobytes(): image for image in teacher.split(1)}
    for image in images.values():
        score = fastmt.reference.softmax_confidence(image.double(), size=options["size"]).score
        assert (score - options["threshold"]).abs().min() > 3e-6
