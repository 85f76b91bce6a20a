"""A stub of a GPU: what runs on it computes nothing, and shows what the host does for it.

    python -m benchmarks.stub_gpu -m pytest tests/gpu/test_streams_on_a_gpu.py
    FASTMT_STUB_GPUS=2 python -m benchmarks.stub_gpu script.py

Runs Python with libraries preloaded that answer for the CUDA driver and, where PyTorch is built for
CUDA, its runtime. Results are wrong, as no kernel runs; what a call costs the host, how many
kernels it launches and whether Python code for GPUs runs through, is not.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
DRIVER, RUNTIME = "libcuda.so.1", "libstub_runtime.so"


class Missing(RuntimeError):
    """What the stub needs and this machine has not."""


def build(folder: Path, *, runtime: bool) -> dict[str, str]:
    """Compile the stub into a folder; the environment variables that put it in a GPU's place.

    runtime: the runtime's too, for a PyTorch that is built for CUDA.
    """
    triton = importlib.util.find_spec("triton")
    if triton is None:
        raise Missing("needs Triton, which comes with headers of CUDA")
    own = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    libraries = [_compile(folder / DRIVER, "driver.cpp", [own])]
    if runtime:
        libraries.append(_compile(folder / RUNTIME, "runtime.cpp", [*_headers(), own]))
    return {"LD_PRELOAD": ":".join(libraries), "TRITON_LIBCUDA_PATH": str(folder)}


def _headers() -> Iterator[Path]:
    """Of PyTorch's CUDA: of the packages that came with it, and of a toolkit.

    The packages' lack what Triton's have, a few files that say nothing of a version.
    """
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations if spec else None) or ():
        yield from Path(place).glob(f"cu{torch.version.cuda.split('.')[0]}/include")
    yield Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"


def _compile(library: Path, source: str, headers: list[Path]) -> str:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise Missing("needs a C++ compiler")
    places = [option for path in headers for option in ("-isystem", str(path))]
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    command = [compiler, *options, *places, str(FOLDER / source), "-o", str(library), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"{source} does not compile: {done.stderr[-2000:]}")
    return str(library)
