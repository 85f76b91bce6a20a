"""Launches past Triton's dispatcher, against the dispatcher's own, on a stub of the CUDA driver."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "stub_driver"
HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
KERNELS = {
    *("consistency_kernel", "consistency_total_kernel", "cells_consistency_kernel"),
    *("cross_entropy_kernel", "cross_entropy_total_kernel", "cells_cross_entropy_kernel"),
    *("confidence_kernel", "cells_confidence_kernel", "join_kernel", "fold_kernel"),
    *("slices_fwd_kernel", "slices_bwd_kernel", "scale_kernel", "ema_kernel"),
}


@pytest.fixture
def stub(tmp_path):
    """The shared library that Triton takes for the driver; what it builds itself needs the same."""
    compiler = shutil.which("c++") or shutil.which("g++")
    python = Path(sysconfig.get_paths()["include"], "Python.h")
    if platform.system() != "Linux" or not compiler:
        pytest.skip("needs Linux and a C++ compiler")
    for header in (python, HEADERS / "cuda.h"):
        if not header.exists():
            pytest.skip(f"needs {header}")
    library = tmp_path / "libcuda.so.1"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    source = str(FOLDER / "driver.cpp")
    command = [compiler, *options, "-isystem", str(HEADERS), source, "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def test_launches_past_the_dispatcher_tell_the_driver_what_the_dispatcher_tells_it(stub):
    environment = {
        **os.environ,
        "LD_PRELOAD": str(stub),
        "TRITON_LIBCUDA_PATH": str(stub.parent),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(FOLDER / "compare.py"), str(stub)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    launches = json.loads(done.stdout)
    assert set(launches) == KERNELS
    assert all(direct == compared > 0 for direct, compared in launches.values())
