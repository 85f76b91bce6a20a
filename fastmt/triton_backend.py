"""Whether the Triton kernels can serve a call, and why not."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastmt import library
from fastmt.arguments import first_line

_MOST_DIMENSIONS = 5  # (N, C, *spatial) that the kernels walk


def obstacle(operation: str, tensors: Sequence[Tensor]) -> str | None:
    """Why no Triton kernel serves a call on these tensors, if none does."""
    if reason := missing():
        return reason
    if operation == "gaussian_noise":
        return "no Triton kernel serves gaussian_noise"
    for tensor in tensors:
        if not tensor.is_cuda and not tensor.is_cpu:
            return f"no kernel for device {tensor.device.type!r}"
        if reason := launch_obstacle(tensor.device):
            return reason
        if tensor.ndim > _MOST_DIMENSIONS and operation != "ema_update_":
            return f"{tensor.ndim - 2}-D images are computed by the reference"
    return None


def operations() -> Any:
    """What holds the operations: the kernels' own module, or in a traced graph nodes of it."""
    return nodes() if torch.compiler.is_compiling() else kernels()


def nodes() -> Any:
    """The operations as nodes, which also take tensors that stand for several, as under vmap."""
    _define_nodes()
    return torch.ops.fastmt_triton


@library.constant_while_tracing
def missing() -> str | None:
    """Import the kernels once; None when they are there, else the reason why not."""
    return _import()


@functools.cache
def _import() -> str | None:
    try:
        kernels()
    except ImportError as error:
        if error.name == "fastmt.kernels":  # in a folder of its own until fastmt is installed
            return f"fastmt is imported from its source without being installed: {error}"
        return f"Triton is not installed: {error}"
    return None


@functools.cache
def kernels() -> ModuleType:
    return importlib.import_module("fastmt.kernels")


@library.constant_while_tracing
def _define_nodes() -> None:
    _nodes()


@functools.cache
def _nodes() -> torch.library.Library:
    return library.define("fastmt_triton", kernels())  # they end with what is returned


@library.constant_while_tracing
def launch_obstacle(device: torch.device) -> str | None:
    """Why Triton cannot launch on a device, if it cannot: a kernel is launched to see."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # nothing of this may become part of a graph
    return _launch_obstacle(device)


@functools.cache
def _launch_obstacle(device: torch.device) -> str | None:
    if kernels().INTERPRETED:
        return None
    if device.type == "cpu":
        return "on CPU tensors Triton kernels run only with TRITON_INTERPRET=1 set from the start"
    if not torch.version.hip and (found := torch.cuda.get_device_capability(device)) < (7, 0):
        return f"compute capability {found[0]}.{found[1]} is below the 7.0 that Triton serves"
    return _compiler_obstacle() or _failure(device)


def _compiler_obstacle() -> str | None:
    """Triton asks for these by name."""
    given = os.environ.get("CC")
    if any(map(shutil.which, ("gcc", "clang") if given is None else (given,))):
        return None
    got = "neither" if given is None else f"CC={given!r}, which is not there"
    return f"Triton needs a C compiler to launch kernels, gcc or clang on PATH or in CC: got {got}"


def _failure(device: torch.device) -> str | None:
    """What Triton says of a launch, if it fails: headers of Python, a driver, a GPU too new."""
    try:
        number = torch.ones((), device=device)
        kernels().scale_(number.clone(), number, number)
    except Exception as error:
        return f"Triton kernels do not run on {device}: {first_line(error)}"
    return None
