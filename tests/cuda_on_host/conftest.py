"""The kernels of csrc/cuda, compiled for this machine's processor, and on a GPU where there is one.

For the processor their text is the one that nvcc compiles; cuda_on_host.h runs the launches as
loops over blocks and threads. That shows wrong indices, formulas, sums, options, layouts, packs
that are not aligned, votes that a thread of the warp misses, and barriers whose lack changes a
result. It cannot show what only a GPU has: other schedules of the threads, the rounding of the
exponential unit, nor anything of the machine code.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from on_gpu import OnGpu

import fastmt
from fastmt import cpp_backend

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
OPERATIONS = ("softmax_confidence", "consistency_loss", "cross_entropy", "ema_update_", "scale_")


def compiled_once(temporary: Path) -> Path:
    """Compiled by the first of pytest's workers that asks; the others wait for it."""
    folder = temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary
    with open(folder / "cuda_on_host.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "cuda_on_host.so"
        return library if library.exists() else compile_for_host(library)


def compile_for_host(library: Path) -> Path:
    """The library of this folder with the sources of csrc/cuda."""
    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-fno-math-errno", "-fPIC", "-fvisibility=hidden"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{torch_folder}/include"]
    flags += [f"-I{ROOT}/csrc", f"-I{HERE}", "-Wno-unknown-pragmas"]
    # A GPU refuses a pack that is not aligned; here it is an illegal instruction.
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    sources = [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cpp")]
    left_out = {"library.cpp", "device.cpp"}  # which this folder has its own of
    sources = [source for source in sources if source.name not in left_out]
    sources += [ROOT / "csrc/cpu/host.cpp", HERE / "library.cpp"]
    objects = [library.with_name(f"{number}.o") for number in range(len(sources))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(
            lambda pair: run(COMPILER, *flags, "-xc++", "-c", pair[0], "-o", pair[1]),
            zip(sources, objects, strict=True),
        ):
            assert done.returncode == 0, done.stderr
    links = [f"-L{torch_folder}/lib", "-ltorch_cpu", "-ltorch", "-lc10"]
    done = run(COMPILER, "-shared", *objects, *links, "-o", library)
    assert done.returncode == 0, done.stderr
    return library


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def on_host(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    library = torch.library.Library("fastmt_cuda_on_host", "DEF")
    for name in OPERATIONS:
        schema = str(getattr(torch.ops.fastmt, name).default._schema).removeprefix("fastmt::")
        library.define(schema)
    torch.ops.load_library(str(compiled_once(tmp_path_factory.getbasetemp())))
    yield torch.ops.fastmt_cuda_on_host
    library._destroy()


@pytest.fixture(scope="module", params=["host", *["gpu"] * torch.cuda.is_available()])
def operations(request):
    """The operations of csrc/cuda on CPU tensors."""
    if reason := cpp_backend.missing():
        pytest.skip(reason)
    if request.param == "host":
        return request.getfixturevalue("on_host")
    if reason := cpp_backend.cuda_missing():
        pytest.skip(reason)
    return OnGpu(torch.ops.fastmt)


@pytest.fixture(params=[0, 20, 1 << 40], ids="{} busy".format)
def busy_blocks(request, operations):
    """Blocks of as many bands as fit, of a few, of one: by the blocks that keep a GPU busy."""
    if isinstance(operations, OnGpu):
        pytest.skip("a GPU has its own number of multiprocessors: see the tests of a large batch")
    operations.keep_busy(request.param)
    yield
    operations.keep_busy(0)


@pytest.fixture(autouse=True)
def cuda(operations, poisoned, one_thread):
    """Every 4-D call is answered by these kernels, through fastmt's own functions."""

    def consistency_loss(student, *call):
        *before, size, align_corners, wants_gradient = call
        size = list(student.shape[2:]) if size is None else size
        return operations.consistency_loss(student, *before, size, align_corners, wants_gradient)

    answers = torch.library.Library("fastmt", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        answers.impl("consistency_loss", consistency_loss, "CPU", allow_override=True)
        for name in ("cross_entropy", "ema_update_", "scale_"):
            answers.impl(name, getattr(operations, name), "CPU", allow_override=True)
    with fastmt.backend("cpp", strict=True):
        yield
    answers._destroy()
