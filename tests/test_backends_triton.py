"""When Triton answers a call, and the stated reason when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from operands import random_logits

import fastmt
from fastmt import backends, triton_backend

STUDENT, TEACHER = random_logits((2, 5, 6, 7), 1), random_logits((2, 5, 6, 7), 2)
pytestmark = [
    pytest.mark.usefixtures("forgotten_warnings"),
    pytest.mark.skipif(triton_backend.missing() is not None, reason="Triton is not installed"),
]
interpreted = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(interpreted, reason="the interpreter serves CPU tensors")
def test_cpu_tensors_need_the_interpreter_and_are_told_so():
    with fastmt.backend("triton"):
        choice = fastmt.explain(fastmt.consistency_loss, STUDENT, TEACHER)
        assert choice.backend == "eager"
        assert "TRITON_INTERPRET=1" in choice.reason
        with pytest.warns(RuntimeWarning, match="'triton' falls back to eager .*INTERPRET"):
            fastmt.consistency_loss(STUDENT, TEACHER)
    with (
        fastmt.backend("triton", strict=True),
        pytest.raises(RuntimeError, match="^cross_entropy: backend 'triton' cannot serve"),
    ):
        fastmt.cross_entropy(STUDENT, torch.zeros(2, 6, 7, dtype=torch.uint8))


def test_what_triton_has_no_kernel_for_is_not_said_to_be_served(monkeypatch):
    monkeypatch.setattr(triton_backend, "launch_obstacle", lambda device: None)
    with fastmt.backend("triton"):
        choice = fastmt.explain(fastmt.perturb.gaussian_noise, STUDENT)
    assert choice == ("eager", "no Triton kernel serves gaussian_noise")


def test_auto_keeps_cpu_tensors_with_the_cpp_kernels():
    assert fastmt.explain(fastmt.consistency_loss, STUDENT, TEACHER).backend != "triton"


def test_an_old_gpu_is_named_with_what_is_expected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    reason = triton_backend._launch_obstacle.__wrapped__(torch.device("cuda", 0))
    assert reason == "compute capability 6.1 is below the 7.0 that Triton serves"


@pytest.mark.parametrize(
    ("found", "given", "told"),
    [
        ((), None, "got neither"),
        (("cc",), None, "got neither"),
        (("gcc",), "/nowhere/gcc", "got CC='/nowhere/gcc', which is not there"),
        (("clang",), None, None),
        (("cc",), "cc", None),
    ],
)
def test_a_missing_compiler_is_named(monkeypatch, tmp_path, found, given, told):
    for name in found:
        (tmp_path / name).touch(0o755)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_backend, "_failure", lambda device: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if given is not None:
        monkeypatch.setenv("CC", given)
    reason = triton_backend._launch_obstacle.__wrapped__(torch.device("cuda", 0))
    assert reason == told or reason.endswith(told)


def test_what_triton_says_of_a_launch_that_fails_is_the_reason(monkeypatch):
    pytest.importorskip("triton")

    def scale_(*_):
        raise RuntimeError("ptxas fatal: sm_999 is not supported\nmore")

    monkeypatch.setattr(triton_backend.kernels(), "scale_", scale_)
    reason = triton_backend._failure(torch.device("cpu"))
    assert reason == "Triton kernels do not run on cpu: ptxas fatal: sm_999 is not supported"


def test_float64_subclasses_devices_and_ranks_are_stated_reasons():
    meta = STUDENT.to("meta")
    reasons = {
        "float64 is computed by the reference": (STUDENT, TEACHER.double()),
        "tensors on different devices: cpu and meta": (STUDENT, meta),
        "no kernel for device 'meta'": (meta, meta),
    }
    for reason, tensors in reasons.items():
        assert backends._resolve("consistency_loss", "triton", tensors, None, False, "") == (
            "eager",
            reason,
        )


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("triton", "Triton is not installed: "),
        ("fastmt.kernels", "fastmt is imported from its source without being installed: "),
    ],
)
def test_a_machine_without_triton_or_its_kernels_runs_and_says_what_is_missing(module, reason):
    program = f"""
import sys, warnings
sys.modules[{module!r}] = None
import fastmt, torch
z = torch.zeros(2, 3)
assert not fastmt.consistency_loss(z, z, threshold=0.0)
with fastmt.backend("triton"):
    print(fastmt.explain(fastmt.consistency_loss, z, z))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"backend='eager', reason={reason!r}"[:-1] in done.stdout.replace('"', "'")


@pytest.mark.parametrize("classes", [300, 4096])
def test_any_number_of_classes_is_up_sampled_inside(monkeypatch, classes):
    monkeypatch.setattr(triton_backend, "launch_obstacle", lambda device: None)
    logits = torch.zeros(1, classes, 4, 4)
    with fastmt.backend("triton"):
        for call in (fastmt.consistency_loss, logits, logits), (fastmt.softmax_confidence, logits):
            assert fastmt.explain(*call, size=(8, 8)).backend == "triton"
