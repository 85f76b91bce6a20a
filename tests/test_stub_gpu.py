"""What Triton and PyTorch tell a stub of a GPU: launches past Triton's dispatcher and its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from benchmarks import host, stub_gpu

triton = pytest.importorskip("triton")
launch = pytest.importorskip("fastmt.kernels.launch")

COMPARED = Path(__file__).with_name("launches_compared.py")
KERNELS = {
    *("consistency_kernel", "consistency_total_kernel", "cells_consistency_kernel"),
    *("cross_entropy_kernel", "cross_entropy_total_kernel", "cells_cross_entropy_kernel"),
    *("cross_entropy_weight_kernel", "cross_entropy_denominator_kernel"),
    *("confidence_kernel", "cells_confidence_kernel", "join_kernel"),
    *("slices_fwd_kernel", "slices_bwd_kernel", "scale_kernel", "ema_kernel"),
}


@pytest.fixture
def variables(tmp_path):
    """Of an environment in which Triton takes the stub for the driver."""
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version not in launch.DIRECT:
        pytest.skip(f"launch.py does not name Triton {triton.__version__}")
    if platform.system() != "Linux":
        pytest.skip("needs Linux")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        pytest.skip("needs Python.h, which Triton compiles its launcher with")
    try:
        return stub_gpu.build(tmp_path, runtime=False)
    except stub_gpu.Missing as reason:
        pytest.skip(str(reason))


def test_launches_past_the_dispatcher_tell_the_driver_what_the_dispatcher_tells_it(variables):
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(COMPARED)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    launches = json.loads(done.stdout)
    assert set(launches) == KERNELS
    assert all(direct == compared > 0 for direct, compared in launches.values())


def test_pytorch_takes_the_stub_for_a_gpu(tmp_path):
    try:
        stub_gpu.build(tmp_path, runtime=True)
    except stub_gpu.Missing as reason:
        pytest.skip(str(reason))
    script = "import torch; print((torch.ones(3, device='cuda') + 1).device)"
    command = [sys.executable, "-m", "benchmarks.stub_gpu", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == ["cuda:0"], done.stderr[-2000:]


@pytest.mark.skipif(bool(torch.version.cuda), reason="this torch is built for CUDA")
@pytest.mark.parametrize("module", ["benchmarks.stub_gpu", "benchmarks.host"])
def test_a_pytorch_without_cuda_is_told(module):
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr == f"torch {torch.__version__} is not built for CUDA 13\n"


def test_a_folder_that_cannot_be_named_in_a_list_of_libraries_is_refused(tmp_path):
    with pytest.raises(stub_gpu.Missing, match="without blanks and colons"):
        stub_gpu.build(tmp_path / "a b", runtime=False)


def test_the_host_times_are_a_table_with_a_star_at_what_auto_takes():
    eager, triton = {"host_us": 7.62, "launches": 2}, {"host_us": 12.5, "launches": 1}
    case = {"name": "a case", "auto": "triton", "variants": {"eager": eager, "triton": triton}}
    result = {"processor": "CPU", "versions": {"torch": "2", "cuda": None}, "date": "today"}
    table = host.markdown({**result, "commit": "c", "rounds": 3, "cases": [case]}).splitlines()
    assert table[0] == "CPU; torch 2; today, commit c"
    assert table[-2:] == ["| a case | eager | 7.6 us | 2 |", "| a case | triton * | 12.5 us | 1 |"]
