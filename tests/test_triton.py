"""The Triton kernels without a GPU: tests/triton_kernels in a process with Triton's interpreter.

The folder is not called triton: pytest puts tests/ on the path, and where Triton is not installed,
torch would import the folder in its place.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent / "triton_kernels"


def test_the_triton_kernels_pass_their_tests_under_the_interpreter():
    triton = pytest.importorskip("triton")
    if _version(triton) < (3, 7) and _version(np) >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 needs NumPy before 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)]
    if (processes := (os.cpu_count() or 1) // 2) > 1:  # the other half has the other tests
        command += ["--numprocesses", str(processes), "--dist", "loadfile"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=FOLDER.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}{done.stderr[-2000:]}"


def _version(module) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))
