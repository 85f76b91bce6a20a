"""The benchmarks: byte models, refusals and the report, at tiny sizes and without any timing."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmt
from benchmarks import (
    bench_ema,
    bench_trainer,
    harness,
    inputs,
    machine,
    models,
    report,
    scaling,
    stopwatch,
)
from benchmarks.networks import ResNet50
from benchmarks.shapes import (
    HEADLINE,
    Shape,
    resnet50_parameters,
    segformer_b5_parameters,
    unet_parameters,
)
from fastmt import cpp_backend
from fastmt.backends import Choice

CPU = torch.device("cpu")
SHAPE = Shape(2, 5, (12, 17))
needs_kernels = pytest.mark.skipif(
    cpp_backend.missing() is not None, reason="counts the tensors that the kernels are given"
)


class CountedBytes(TorchDispatchMode):
    """Adds up the tensors that the kernels read and write, without single numbers."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.name().partition(".")[0]
        if name == "fastmt::ema_bind":
            averages, values = args[:2]
            self.total += sum(2 * t.nbytes for t in averages) + sum(t.nbytes for t in values)
        elif name.startswith("fastmt::ema"):
            pass  # on the tensors that were bound
        elif name.startswith("fastmt::") and name != "fastmt::scale_":
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
            self.total += sum(t.nbytes for t in tensors if t.numel() > 1)
        return result


def logits(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return inputs.logits(SHAPE, dtype=dtype, device=CPU, seed=seed)


def work(actual: torch.Tensor, expected: torch.Tensor, calls: list[str]) -> harness.Work:
    def fused() -> list[torch.Tensor]:
        calls.append("fused")
        return [actual]

    choice = Choice("eager", "a test")
    return harness.Work({"fused": fused}, lambda: [expected], 1e-5, actual.nbytes, choice)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("passes", [1, 3])
def test_consistency_byte_model_is_what_the_kernel_is_given(dtype, passes):
    student = logits(0, dtype).requires_grad_()
    teachers = [logits(1 + i, dtype) for i in range(passes)]
    weight = torch.rand(SHAPE.batch, *SHAPE.spatial)
    with CountedBytes() as counted:
        fastmt.consistency_loss(student, teachers, pixel_weight=weight).backward()
    assert models.consistency_loss(student, teachers, weight, None) == counted.total


@needs_kernels
def test_confidence_byte_model_is_what_the_kernel_is_given():
    with CountedBytes() as counted:
        fastmt.softmax_confidence([logits(0), logits(1)])
    assert models.softmax_confidence([logits(0), logits(1)]) == counted.total


@needs_kernels
def test_cross_entropy_byte_model_is_what_the_kernel_is_given():
    student, labels = logits(0).requires_grad_(), inputs.labels(SHAPE, device=CPU, seed=0)
    with CountedBytes() as counted:
        fastmt.cross_entropy(student, labels).backward()
    assert models.cross_entropy(student, labels) == counted.total


@needs_kernels
def test_ema_byte_model_is_twelve_bytes_a_parameter():
    teacher, student = (inputs.parameters(((7, 3), (40,)), device=CPU, seed=s) for s in (0, 1))
    with CountedBytes() as counted:
        fastmt.ema_update_(teacher, student, 0.9)
    assert models.ema_update_(teacher, student) == counted.total == 12 * (7 * 3 + 40)


@pytest.mark.parametrize(
    "actual",
    [torch.tensor([1.0, 2.001]), torch.tensor([1.0, math.nan]), torch.ones(3)],
    ids=["off", "nan", "shape"],
)
def test_a_wrong_result_is_not_timed(actual):
    calls: list[str] = []
    case = harness.Case("wrong", "test", lambda *_: work(actual, torch.tensor([1.0, 2.0]), calls))
    with pytest.raises(harness.WrongResult, match=r"fused: error .* not timed"):
        harness.measure(case, CPU, rounds=1)
    assert calls == ["fused"]


def test_a_right_result_is_timed_once_a_round():
    right = torch.tensor([1.0, 2.0])
    case = harness.Case("right", "test", lambda *_: work(right.clone(), right, []))
    result = harness.measure(case, CPU, rounds=4, sample_seconds=0, copy_bytes=1 << 16)
    assert len(result["variants"]["fused"]["samples_s"]) == len(result["copy_samples_s"]) == 4
    assert result["variants"]["fused"]["error"] == 0


def test_each_timed_call_starts_without_a_gradient():
    leaf, seen = torch.ones(3, requires_grad=True), []

    def fused() -> list[torch.Tensor]:
        seen.append(leaf.grad)
        leaf.sum().backward()
        return [leaf.grad]

    compared = harness.Work({"fused": fused}, list, 0, 1, Choice("eager", "a test"), leaves=(leaf,))
    runs = {"fused": compared.runner("fused")}
    harness.interleave(runs, CPU, rounds=3, sample_seconds=0)
    assert len(seen) > 3 and all(gradient is None for gradient in seen)


def test_peak_memory_sees_what_a_call_takes_and_gives_back():
    def call() -> None:
        first = torch.ones(8 << 20)
        (first + 1).sum()

    call()
    peak = machine.peak_extra_bytes(call, CPU)
    if peak is None:
        pytest.skip("this system keeps no record of the largest resident size")
    assert 62 << 20 <= peak <= 72 << 20


def test_stopwatch_parts_add_up_to_the_whole(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(clock))
    watch = stopwatch.Stopwatch(CPU)
    inner = watch.around("inner", lambda: watch.switch("after"))
    watch.around("outer", lambda: (inner(), inner()))()
    assert dict(watch.seconds) == {"outer": 5, "inner": 2, "after": 2}
    assert sum(watch.seconds.values()) == next(clock) - 1


def test_measured_teachers_stay_clear_of_the_threshold_and_of_ties():
    values = inputs.logits(Shape(1, 19, (256, 256)), device=CPU, seed=0, threshold=0.7).double()
    best = values.topk(2, dim=1).values
    assert (values.softmax(1).amax(1) - 0.7).abs().min() > 1e-4
    assert (best[:, 0] - best[:, 1]).min() > 1e-4


def test_threshold_for_upsampled_teachers_stays_clear_of_their_scores():
    teacher = inputs.logits(Shape(1, 19, (64, 64)), device=CPU, seed=0)
    threshold = inputs.clear_threshold(teacher, (256, 256), near=0.7)
    large = torch.nn.functional.interpolate(teacher.double(), (256, 256), mode="bilinear")
    assert 0.69 < threshold < 0.71
    assert (large.softmax(1).amax(1) - threshold).abs().min() > 1e-5


def test_parameters_are_those_of_the_papers():
    assert sum(map(math.prod, unet_parameters(classes=2))) == pytest.approx(31.04e6, rel=1e-3)
    assert sum(map(math.prod, segformer_b5_parameters())) == pytest.approx(84.6e6, rel=1e-3)
    network = ResNet50()
    shapes = sorted(tuple(parameter.shape) for parameter in network.parameters())
    assert shapes == sorted(resnet50_parameters()) and len(list(network.buffers())) == 159
    assert HEADLINE.lowered(4).dims == (2, 19, 128, 128)


def test_the_set_of_the_moving_average_has_its_own_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.main(["--cases", "ema", "--only", "no such case"])
    assert json.loads((tmp_path / "cpu-ema.json").read_text())["cases"] == []
    assert any("ViT-L" in case.name for case in bench_ema.cases("ema"))


def test_the_report_of_a_gpu_says_that_there_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        report.main(["--device", "cuda", "--cases", "ema"])
    assert "no GPU: " in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_report_writes_json_and_markdown(tmp_path, capsys, one_thread):
    out = tmp_path / "results" / "tiny.json"
    report.main(["--tiny", "--no-compile", "--rounds", "2", "--out", str(out)])
    result, table = json.loads(out.read_text()), out.with_suffix(".md").read_text()
    assert capsys.readouterr().out.strip() == table.strip()
    assert {"date", "commit", "device", "threads", "versions"} <= result.keys()
    assert {case["group"] for case in result["cases"]} == {
        "consistency loss",
        "consistency loss, up-sampled inside",
        "small images",
        "confidence",
        "confidence, up-sampled inside",
        "cross-entropy",
        "cross-entropy, up-sampled inside",
        "EMA",
    }
    assert result["left_out"] == {}
    for case in result["cases"]:
        assert case["ratios"].keys() == case["variants"].keys() - {"fused"}
        assert case["fused_gb_per_s"] > 0 and case["fraction_of_copy"] > 0
        assert f"| {case['name']} | {case['backend']} |" in table
    for step in result["trainer"]["steps"].values():
        assert sum(step["parts_s"].values()) > step["own_s"] > 0


def test_a_report_is_written_after_each_case_and_outlives_those_that_fail(
    tmp_path, capsys, one_thread, monkeypatch
):
    out, written = tmp_path / "ema.json", []

    def fails(device, compiled):
        written.append(json.loads(out.read_text())["cases"][0]["name"])
        raise RuntimeError("out of memory\nin detail")

    good = bench_ema.cases("tiny")[0]
    cases = [good, harness.Case("bad", "EMA", fails), dataclasses.replace(good, name="last")]
    monkeypatch.setattr(bench_ema, "cases", lambda which: cases)
    measure = partial(harness.measure, sample_seconds=0, copy_bytes=1 << 16)
    monkeypatch.setattr(harness, "measure", measure)
    assert report.main(["--cases", "ema", "--rounds", "2", "--out", str(out)]) == 1
    result, table = json.loads(out.read_text()), out.with_suffix(".md").read_text()
    assert written == [good.name]
    assert [case["name"] for case in result["cases"]] == [good.name, "last"]
    assert result["left_out"] == {"EMA: bad": "RuntimeError: out of memory"}
    assert table.endswith("Left out:\n\n- EMA: bad: RuntimeError: out of memory\n")


def test_a_baseline_that_is_wrong_is_left_out_of_its_case(capsys):
    right = torch.tensor([1.0, 2.0])
    fused = work(right.clone(), right, [])
    broken = dataclasses.replace(fused, variants={**fused.variants, "loop": lambda: [2 * right]})
    case = harness.Case("broken", "test", lambda *_: broken)
    result = harness.measure(case, CPU, rounds=1, sample_seconds=0, copy_bytes=1 << 16)
    assert result["variants"].keys() == {"fused"}
    assert result["left_out"]["loop"].startswith("WrongResult: loop: error")


def test_what_is_quicker_than_our_averages_is_named():
    ratios = {"loop": 2.0, "_foreach_lerp_": 0.5, "EMATeacher": 1.25, "kernel": 0.1, "other": 1.0}
    assert bench_ema.quicker({"ratios": ratios}) == {
        "ema_update_": {"_foreach_lerp_": 0.5},
        "EMATeacher.update": {"_foreach_lerp_": 0.4, "other": 0.8},
    }
    slower = dict.fromkeys(ratios, 2.0) | {"EMATeacher": 1.0}
    assert bench_ema.quicker({"ratios": slower}) == {}


@needs_kernels
def test_scaling_writes_figures_table_and_plot(tmp_path, capsys, one_thread):
    out = tmp_path / "results" / "scaling.json"
    scaling.main(["--sides", "64", "96", "--no-compile", "--rounds", "2", "--out", str(out)])
    result, table = json.loads(out.read_text()), out.with_suffix(".md").read_text()
    assert capsys.readouterr().out.strip() == table.strip()
    assert [case["side"] for case in result["cases"]] == [64, 96]
    assert "| 96 |" in table and "| exponentials |" in table
    assert result["breakdown"]["of_floor"] > 0
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_logits_in_steps_leave_no_two_classes_nearly_equal_between_pixels():
    low = inputs.logits(Shape(1, 19, (32, 32)), device=CPU, seed=0, in_steps=True)
    large = torch.nn.functional.interpolate(low.double(), (256, 256), mode="bilinear")
    best = large.topk(2, dim=1).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-5


def test_every_case_of_the_real_sets_has_its_own_name():
    for which in ("quick", "full"):
        names = [case.name for module in report.MODULES for case in module.cases(which)]
        assert len(names) == len(set(names))


def test_trainer_benchmark_refuses_a_wrong_loss(monkeypatch):
    losses = iter([torch.tensor(1.0), torch.tensor(1.1)])
    wrong = type("Trainer", (), {"step": lambda *_: type("R", (), {"loss": next(losses)})})
    monkeypatch.setattr(bench_trainer, "trainer", lambda *_: wrong())
    with pytest.raises(harness.WrongResult, match="first step's loss"):
        bench_trainer.measure(bench_trainer.TINY_STEP, CPU, steps=1)
