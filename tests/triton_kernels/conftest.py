"""The Triton kernels under their interpreter, or on a GPU where there is one.

TRITON_INTERPRET has to be set before triton is imported: tests/test_triton.py runs this folder in a
process of its own. With neither the folder is left out.

FASTMT_COMPILE_FOR=sm_90 compiles what the tests launch, for a GPU that is not here, into Triton's
cache (TRITON_CACHE_DIR), and lets C++ answer: on a GPU compiling would take most of the time.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from on_gpu import NAMES, OnGpu

import fastmt
from fastmt import cpp_backend, triton_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TARGET = os.environ.get("FASTMT_COMPILE_FOR")
SERVED = INTERPRETED or TARGET or torch.cuda.is_available()
KEPT = 5  # of the cases of a test written for the fast kernels, a GPU runs each fifth
collect_ignore_glob = [] if SERVED else ["test_*.py"]


if INTERPRETED:
    import interpreter

    interpreter.mend()


def pytest_configure(config):
    # The interpreter computes padding as NumPy does, and NumPy warns of every NaN.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")


def pytest_collection_modifyitems(items):
    """Thins out imported tests where Triton compiles what they launch."""
    if INTERPRETED:
        return
    seen: dict[str, int] = {}
    for item in list(items):
        function = getattr(item, "function", None)
        if function is None or function.__module__ == item.module.__name__:
            continue
        seen[item.originalname] = seen.get(item.originalname, -1) + 1
        if seen[item.originalname] % KEPT:
            items.remove(item)


def compiled_only(operation):
    """Compiles what an operation launches; C++ gives the answer."""
    from benchmarks import aot
    from fastmt.kernels import launch

    def answered(*arguments):
        with aot.compiling(TARGET):
            launch._compiled.clear()
            launch.forget()
            operation(*arguments)
        if operation.__name__ == "consistency_loss" and isinstance(arguments[2], float):
            arguments = (*arguments[:2], torch.tensor([arguments[2]]), *arguments[3:])
        if operation.__name__.startswith("resample_slices"):
            arguments = (arguments[0].contiguous().float(), *arguments[1:])
        return getattr(torch.ops.fastmt, operation.__name__)(*arguments)

    return answered


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """Without the interpreter, the kernels take tensors of the CPU to a GPU."""
    if INTERPRETED:
        return
    if TARGET and (missing := cpp_backend.missing()):  # which loads what is to answer
        pytest.skip(missing)
    from fastmt import kernels as triton_kernels  # where there is no Triton, this is not reached

    own = SimpleNamespace(**{name: getattr(triton_kernels, name) for name in NAMES})
    there = OnGpu(own)
    for name in NAMES:
        answer = compiled_only(getattr(own, name)) if TARGET else getattr(there, name)
        monkeypatch.setattr(triton_kernels, name, answer)
    monkeypatch.setattr(triton_backend, "launch_obstacle", lambda device: None)


@pytest.fixture
def kernels(poisoned, one_thread):
    """Every call is answered by the Triton kernels, or raises."""
    with fastmt.backend("triton", strict=True):
        yield


@pytest.fixture(params=["triton"])
def either(request, kernels):
    """The Triton kernels, for tests that other folders run on several implementations."""
    return request.param
