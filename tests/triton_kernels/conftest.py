"""The Triton kernels under their interpreter, or on a GPU where there is one.

TRITON_INTERPRET has to be set before triton is imported: tests/test_triton.py runs this folder in a
process of its own. With neither the folder is left out.

FASTMT_COMPILE_FOR=sm_90 compiles what the tests launch, for a GPU that is not here, into Triton's
cache (TRITON_CACHE_DIR), and lets C++ answer: on a GPU compiling would take most of the time.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
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
    import triton.language as tl
    from triton.runtime import interpreter

    patched: set[int] = set()

    def call_device_function(self, *args, **kwargs):
        # triton.language is patched once a module, not once a call: a third of the time.
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def convert_float(values, source, target, rounding):
        # To bfloat16 the interpreter truncates, from it subnormal numbers become 0; every GPU
        # rounds to the nearest, and keeps these.
        if source == tl.bfloat16 and target == tl.float32:
            return (values.astype(np.uint32) << 16).view(np.float32)
        if source != tl.float32 or target != tl.bfloat16:
            return truncating(values, source, target, rounding)
        rounded = torch.from_numpy(np.array(values, np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    def of_numbers(function):
        # NumPy's maximum is NaN beside a NaN; a GPU's is the other number.
        return lambda self, a, b: self.binary_op(a, b, function)

    def fused(self, x, y, z):
        # The interpreter rounds a product before it adds to it; a GPU does not.
        with np.errstate(all="ignore"):
            exact = x.data.astype(np.float64) * y.data + z.data
            return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    truncating = interpreter._convert_float
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_fma = fused
    interpreter.InterpreterBuilder.create_maxnumf = of_numbers(np.fmax)
    interpreter.InterpreterBuilder.create_minnumf = of_numbers(np.fmin)
    interpreter.InterpretedFunction.__call__ = call_device_function


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
