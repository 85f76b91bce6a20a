"""The CUDA library as nvcc builds it: no spills, a true table, and it loads beside the C++ one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmt
from benchmarks import cuda_resources
from fastmt import backends, cpp_backend

ROOT = Path(__file__).parents[1]
LIBRARY = Path(fastmt.__file__).parent / "_CUDA.abi3.so"
RECORD = cpp_backend.build_info().get("cuda", {})
COMPILER = next(filter(shutil.which, ("c++", "g++", "clang++")), None)

built = pytest.mark.skipif(
    not RECORD.get("built") or not LIBRARY.exists(),
    reason=f"the CUDA kernels are not built: {RECORD.get('reason', 'no build record')}",
)

REGISTRATIONS = """
import ctypes, sys, torch
sys.path[:0] = [{root!r}]
import fastmt
from fastmt import cpp_backend
assert cpp_backend.missing() is None
ctypes.CDLL({stub!r}, mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library({library!r})
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*(has("fastmt::" + name, "CUDA") for name in {names!r}))
"""


@built
def test_no_kernel_spills_registers():
    spilling = [kernel for kernel in RECORD["kernels"] if kernel["spilled"]]
    assert RECORD["kernels"]
    assert not spilling


@built
@pytest.mark.parametrize("classes", ["19", "21"])
def test_every_gpu_has_kernels_of_a_constant_number_of_classes(classes):
    expected = {
        f"cells_{operation}_{kind}_kernel"
        for operation in ("consistency", "cross_entropy")
        for kind in ("powers", "logits")
    } | {"cells_consistency_ce_powers_kernel", "cells_confidence_kernel"}
    for architecture in {kernel["architecture"] for kernel in RECORD["kernels"]}:
        found = {
            kernel["kernel"]
            for kernel in RECORD["kernels"]
            if (kernel["variant"], kernel["architecture"]) == (classes, architecture)
        }
        assert found == expected


@built
def test_the_committed_table_is_that_of_this_build():
    committed = json.loads((cuda_resources.RESULTS / "cuda-resources.json").read_text())
    made = cuda_resources.table()
    if made["compiler"] != committed["compiler"]:
        pytest.skip(f"the table is that of another nvcc, {committed['compiler']}")
    architectures = {row["GPU"] for row in made["rows"]}
    if architectures != {row["GPU"] for row in committed["rows"]}:
        pytest.skip(f"this build is for {', '.join(sorted(architectures))}")
    assert made == committed
    text = (cuda_resources.RESULTS / "cuda-resources.md").read_text()
    assert text == cuda_resources.markdown(committed)


@built
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_the_library_loads_and_answers_the_operations_on_cuda_tensors(tmp_path):
    """With a stand-in for the one symbol that only a CUDA build of torch has."""
    source, stub = tmp_path / "stub.c", tmp_path / "stub.so"
    source.write_text("int aoti_torch_get_current_cuda_stream(int d, void** s) { return 1; }\n")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-xc", source, "-o", stub], check=True)
    names = ("softmax_confidence", "consistency_loss", "cross_entropy", "ema_update_", "scale_")
    program = REGISTRATIONS.format(
        root=str(ROOT), stub=str(stub), library=str(LIBRARY), names=names
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * len(names)


def test_without_a_device_the_cuda_kernels_are_absent_for_a_stated_reason(monkeypatch):
    look = cpp_backend._load_cuda.__wrapped__
    monkeypatch.setattr(cpp_backend, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert look() == "no CUDA device is available"


def test_a_cuda_library_that_is_absent_or_broken_is_a_reason_not_a_crash(monkeypatch, tmp_path):
    look = cpp_backend._load_cuda.__wrapped__
    monkeypatch.setattr(cpp_backend, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpp_backend, "_PACKAGE", tmp_path)
    assert look() == "the CUDA C++ kernels are not built: no build record"
    (tmp_path / "_build_info.json").write_text('{"cuda": {"reason": "no nvcc on PATH"}}')
    assert look() == "the CUDA C++ kernels are not built: no nvcc on PATH"
    (tmp_path / "_CUDA.abi3.so").write_text("not a library")
    assert look().startswith("the CUDA C++ kernels do not load: ")


def test_what_the_cuda_kernels_leave_to_others_is_a_stated_reason(monkeypatch):
    monkeypatch.setattr(cpp_backend, "cuda_missing", lambda: None)
    obstacle = cpp_backend.cuda_obstacle
    logits, others = torch.empty(1, 19, 2, 2), torch.empty(1, 20, 2, 2)
    assert obstacle("consistency_loss", [others] * 17, True) is None
    assert obstacle("cross_entropy", [others], True) is None
    assert obstacle("softmax_confidence", [logits], True) is None
    assert obstacle("ema_update_", [logits], False) is None
    for operation in ("consistency_loss", "cross_entropy", "softmax_confidence"):
        assert obstacle(operation, [logits], False) == (
            "the CUDA C++ kernels serve logits that they up-sample"
        )
    reason = obstacle("consistency_loss", [logits] * 18, True)
    assert reason == "17 teachers are more than the 16 of the CUDA C++ kernels"
    for tensors in ([others], [logits] * 2):
        assert obstacle("softmax_confidence", tensors, True) == (
            "the CUDA C++ kernels score one teacher of 19 or 21 classes"
        )
    monkeypatch.setattr(cpp_backend, "cuda_missing", lambda: "not built")
    assert obstacle("ema_update_", [logits], False) == "not built"


def test_a_gpu_that_the_cuda_kernels_do_not_run_on_is_a_stated_reason(monkeypatch):
    def scale_(*_):
        raise RuntimeError("fastmt: CUDA says no kernel image is available for execution\nmore")

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    # Not yet there where the C++ kernels have not been loaded.
    monkeypatch.setattr(torch.ops.fastmt, "scale_", scale_, raising=False)
    assert cpp_backend._launch.__wrapped__(3) == (
        "the CUDA C++ kernels do not run on cuda:3: "
        "fastmt: CUDA says no kernel image is available for execution"
    )
    monkeypatch.setattr(torch.ops.fastmt, "scale_", lambda *_: None, raising=False)
    assert cpp_backend._launch.__wrapped__(3) is None


class Elsewhere:
    """As much of a tensor on a GPU as the choice of a backend asks for."""

    is_cpu, is_cuda, dtype, ndim = False, True, torch.float32, 4
    device = torch.device("cuda", 0)

    def __init__(self, classes):
        self.shape = (1, classes, 2, 2)

    def get_device(self):
        return 0


@pytest.fixture
def triton_obstacle(monkeypatch):
    """A GPU that both kinds of kernels serve, Triton's as long as the list is empty."""
    reasons = []
    monkeypatch.setattr(backends, "_tensor_obstacle", lambda tensors: None)
    monkeypatch.setattr(cpp_backend, "missing", lambda: None)
    monkeypatch.setattr(cpp_backend, "cuda_missing", lambda: None)
    monkeypatch.setattr(cpp_backend, "cuda_launch_obstacle", lambda index: None)
    monkeypatch.setattr(backends.triton_backend, "obstacle", lambda *_: "".join(reasons))
    return reasons


def resolved(name, classes=19, loss="mse"):
    tensors = [Elsewhere(classes)] * 2
    return backends._resolve("consistency_loss", name, tensors, None, True, loss)


def test_triton_takes_over_where_the_cuda_kernels_do_not_run(monkeypatch, triton_obstacle):
    assert resolved("auto").backend == "cpp"
    monkeypatch.setattr(cpp_backend, "cuda_launch_obstacle", lambda index: "no kernel image")
    assert resolved("auto").backend == "triton"
    assert resolved("cpp") == ("eager", "no kernel image")
    triton_obstacle.append("no Triton")
    assert resolved("auto") == ("eager", "no Triton")


@pytest.mark.parametrize(
    ("classes", "loss", "slower"),
    [(19, "mse", False), (21, "ce", False), (21, "kl", True), (19, "bce", True), (20, "mse", True)],
)
def test_triton_comes_first_where_the_cuda_kernels_are_slower(
    triton_obstacle, classes, loss, slower
):
    assert resolved("auto", classes, loss).backend == ("triton" if slower else "cpp")
    assert resolved("cpp", classes, loss).backend == "cpp"
    triton_obstacle.append("no Triton")
    assert resolved("auto", classes, loss).backend == "cpp"
    assert resolved("triton", classes, loss) == ("eager", "no Triton")


def test_a_choice_knows_the_loss(monkeypatch):
    said, choose = [], backends.choose

    def listening(*arguments, loss="", **options):
        said.append(loss)
        return choose(*arguments, loss=loss, **options)

    monkeypatch.setattr(backends, "choose", listening)
    backends._answers.clear()
    logits = torch.zeros(1, 21, 2, 2)
    for loss in ("mse", "bce"):
        fastmt.consistency_loss(logits, logits, loss=loss, size=(4, 4))
    assert said == ["mse", "bce"]


def test_no_table_is_written_without_kernels(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        cpp_backend, "build_info", lambda: {"cuda": {"built": False, "reason": "why"}}
    )
    assert cuda_resources.main(["--out", str(tmp_path / "table.json")]) == 1
    assert "no CUDA kernels here: why" in capsys.readouterr().err
    assert not os.listdir(tmp_path)
