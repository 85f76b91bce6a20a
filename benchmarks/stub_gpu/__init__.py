"""A stub of a GPU: what runs on it computes nothing, and shows what the host does for it.

    python -m benchmarks.stub_gpu -m pytest tests/gpu/test_streams_on_a_gpu.py
    FASTMT_STUB_GPUS=2 python -m benchmarks.stub_gpu script.py

Runs Python with libraries preloaded that answer for the CUDA driver and for the runtime of a
PyTorch that is built for CUDA 13. Results are wrong, as no kernel runs; what a call costs the host,
how many kernels it launches and whether Python code for GPUs runs through, is not. cuBLAS and cuDNN
do not start on it. Where there are real GPUs, NVML still counts those.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
CUDA = "13"  # whose runtime is answered for
DRIVER, RUNTIME = "libcuda.so.1", "libstub_runtime.so"


class Missing(RuntimeError):
    """What the stub needs and this machine has not."""


def build(folder: Path, *, runtime: bool) -> dict[str, str]:
    """Compile the stub into a folder; the environment variables that put it in a GPU's place.

    runtime: the runtime's too, for a PyTorch that is built for CUDA.
    """
    if set(str(folder)) & set(" :"):
        raise Missing(f"needs a folder without blanks and colons, got {folder}")
    if runtime and (torch.version.cuda or "").split(".")[0] != CUDA:
        raise Missing(f"torch {torch.__version__} is not built for CUDA {CUDA}")
    triton = importlib.util.find_spec("triton")
    if triton is None:
        raise Missing("needs Triton, which comes with headers of CUDA")
    own = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    libraries = [_compile(folder / DRIVER, "driver.cpp", [own])]
    if runtime:
        libraries.append(_compile(folder / RUNTIME, "runtime.cpp", [_headers(), own]))
    libraries += filter(None, [os.environ.get("LD_PRELOAD")])
    return {"LD_PRELOAD": ":".join(libraries), "TRITON_LIBCUDA_PATH": str(folder)}


def is_preloaded(variables: dict[str, str]) -> bool:
    """The loader only warns of what it does not preload."""
    command = [sys.executable, "-S", "-c", "import ctypes; ctypes.CDLL(None).launches_so_far"]
    environment = {**os.environ, **variables}
    return subprocess.run(command, env=environment, check=False).returncode == 0


def _headers() -> Path:
    """Of PyTorch's CUDA: of the packages that came with it, or of a toolkit.

    The packages' lack what Triton's have, a few files that say nothing of a version.
    """
    spec = importlib.util.find_spec("nvidia")
    packages = (spec.submodule_search_locations if spec else None) or ()
    places = [Path(place) / f"cu{CUDA}" / "include" for place in packages]
    places.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include")
    for place in places:
        if (place / "cuda_runtime_api.h").exists():
            return place
    raise Missing(f"needs cuda_runtime_api.h in {' or '.join(map(str, places))}")


def _compile(library: Path, source: str, headers: list[Path]) -> str:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise Missing("needs a C++ compiler")
    places = [option for path in headers for option in ("-isystem", str(path))]
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    command = [compiler, *options, *places, str(FOLDER / source), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    return str(library)
