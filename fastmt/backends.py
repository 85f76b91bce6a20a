"""Which implementation answers a call, and the reason.

`auto` takes the fastest implementation that supports the call. Whatever is taken instead of what
was asked for has a stated reason: a warning, once a reason, or with `strict=True` an error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "eager", "triton", "cpp")
MAX_CLASSES = 4096
_PACKAGE = Path(__file__).parent
_MOST_DIMENSIONS = 5  # (N, C, *spatial) that the Triton kernels walk
_TRITON_SERVES = "Triton kernels serve this call"


class Choice(NamedTuple):
    """The implementation of one call and why it was taken."""

    backend: str  # "eager", "triton" or "cpp"
    reason: str


class _Request(NamedTuple):
    backend: str
    strict: bool


class _Answer(BaseException):
    """Carries a choice out of a call that is only being explained."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice


_request: ContextVar[_Request | None] = ContextVar("fastmt_backend", default=None)
_explaining: ContextVar[bool] = ContextVar("fastmt_explaining", default=False)
_warned: set[str] = set()


@contextlib.contextmanager
def backend(name: str, *, strict: bool = False) -> Iterator[None]:
    """Choose the implementation of every fastmt call in this context.

    Args:
        name: "auto" (the fastest that supports the call), "eager" (plain PyTorch), "triton" or
            "cpp". The environment variable FASTMT_BACKEND sets the default.
        strict: raise RuntimeError, instead of falling back to eager, where `name` cannot serve.

    Raises:
        ValueError: unknown name.
    """
    token = _request.set(_Request(_checked(name), strict))
    try:
        yield
    finally:
        _request.reset(token)


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


def choose(operation: str, tensors: Sequence[Tensor], *, obstacle: str | None = None) -> Choice:
    """The implementation for a call on these tensors.

    Args:
        operation: the public name of the operation, for messages.
        tensors: the logits (or parameters) that the kernels would read.
        obstacle: what in the other arguments no kernel supports yet, if anything.
    """
    name, strict = _request.get() or _Request(
        _checked(os.environ.get("FASTMT_BACKEND", "auto")), False
    )
    choice = _resolve(operation, name, tensors, obstacle)
    if _explaining.get():
        raise _Answer(choice)
    if choice.backend == "eager" and name != "eager":
        _report(operation, name, strict, choice.reason)
    return choice


def _resolve(operation: str, name: str, tensors: Sequence[Tensor], obstacle: str | None) -> Choice:
    if name == "eager":
        return Choice("eager", "eager was asked for")
    on_gpu = any(tensor.is_cuda for tensor in tensors)
    if name == "triton" or (name == "auto" and on_gpu):
        reason = _tensor_obstacle(tensors) or _triton_obstacle(operation, tensors) or obstacle
        return Choice("eager", reason) if reason else Choice("triton", _TRITON_SERVES)
    reason = _tensor_obstacle(tensors) or _cpp_obstacle(tensors) or obstacle
    if reason:
        return Choice("eager", reason)
    return Choice("cpp", f"C++ kernels ({instruction_set()}) serve this call")


def operations(backend: str) -> Any:
    """What holds the operations of a backend, by the names and signatures of csrc/library.cpp."""
    return _triton_kernels() if backend == "triton" else torch.ops.fastmt


def _tensor_obstacle(tensors: Sequence[Tensor]) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile is tracing, and traces the reference"
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"no kernel for tensor subclass {type(tensor).__name__}"
        if tensor.device != tensors[0].device:
            return f"tensors on different devices: {tensors[0].device} and {tensor.device}"
        if tensor.dtype == torch.float64:
            return "float64 is computed by the reference"
    return None


def _cpp_obstacle(tensors: Sequence[Tensor]) -> str | None:
    if missing := extension_missing():
        return missing
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"no kernel for device {tensor.device.type!r}"
    return None


def _triton_obstacle(operation: str, tensors: Sequence[Tensor]) -> str | None:
    if missing := triton_missing():
        return missing
    for tensor in tensors:
        if not tensor.is_cuda and tensor.device.type != "cpu":
            return f"no kernel for device {tensor.device.type!r}"
        if not _triton_kernels().INTERPRETED and (obstacle := gpu_obstacle(tensor.device)):
            return obstacle
        if tensor.ndim > _MOST_DIMENSIONS and operation != "ema_update_":
            return f"{tensor.ndim - 2}-D images are computed by the reference"
    return None


@functools.cache
def triton_missing() -> str | None:
    """Import the Triton kernels once; None when they are there, else the reason why not."""
    try:
        _triton_kernels()
    except ImportError as error:
        return f"Triton is not installed: {error}"
    return None


def _triton_kernels() -> ModuleType:
    return importlib.import_module("fastmt.kernels")


@functools.cache
def gpu_obstacle(device: torch.device) -> str | None:
    """Why Triton cannot launch on a device, if it cannot."""
    if device.type == "cpu":
        return "on CPU tensors Triton kernels run only with TRITON_INTERPRET=1 set from the start"
    if not torch.version.hip and (found := torch.cuda.get_device_capability(device)) < (7, 0):
        return f"compute capability {found[0]}.{found[1]} is below the 7.0 that Triton serves"
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "Triton needs a C compiler to launch kernels: gcc or clang on PATH, or CC"
    return None


def classes_obstacle(classes: int) -> str | None:
    if classes > MAX_CLASSES:
        return f"{classes} classes are more than the {MAX_CLASSES} that the kernels hold"
    return None


def _report(operation: str, name: str, strict: bool, reason: str) -> None:
    message = f"{operation}: {name!r} falls back to eager PyTorch: {reason}"
    if strict:
        raise RuntimeError(f"{operation}: backend {name!r} cannot serve this call: {reason}")
    if message not in _warned and not torch.compiler.is_compiling():
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


@functools.cache
def extension_missing() -> str | None:
    """Load the C++ kernels once; None when they are there, else the reason why not."""
    library = _PACKAGE / "_C.abi3.so"
    if not library.exists():
        return f"the C++ kernels are not built: {build_info().get('reason', 'no build record')}"
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"the C++ kernels do not load: {str(error).splitlines()[0]}"
    return None


def build_info() -> dict[str, object]:
    """What the build recorded: which kernels it left out and why."""
    record = _PACKAGE / "_build_info.json"
    return json.loads(record.read_text()) if record.exists() else {}


def instruction_set() -> str:
    """The instruction set that the C++ kernels run with on this machine."""
    if missing := extension_missing():
        return missing
    return torch.ops.fastmt.instruction_set()


def explain(function: Callable, *args: object, **kwargs: object) -> Choice:
    """Which implementation would run `function(*args, **kwargs)`, and why; nothing is computed.

    Args:
        function: a public operation (fastmt.consistency_loss, fastmt.cross_entropy,
            fastmt.softmax_confidence, fastmt.ema_update_) or a module twin of one.

    Returns:
        Choice(backend, reason).

    Raises:
        Whatever the call itself would raise for its arguments; TypeError if `function` is not an
        operation of fastmt.
    """
    token = _explaining.set(True)
    try:
        function(*args, **kwargs)
    except _Answer as answer:
        return answer.choice
    finally:
        _explaining.reset(token)
    raise TypeError(f"function: {function!r} is not an operation of fastmt")
