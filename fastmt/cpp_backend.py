"""Whether the C++ kernels, for CPUs and in CUDA, can serve a call, and why not."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmt import library
from fastmt.arguments import first_line

MAX_TEACHERS = 16  # of the CUDA kernels
FIXED_CLASSES = (19, 21)  # that CUDA kernels keep in registers
_PACKAGE = Path(__file__).parent


def obstacle(tensors: Sequence[Tensor]) -> str | None:
    if reason := missing():
        return reason
    for tensor in tensors:
        if not tensor.is_cpu and not tensor.is_cuda:
            return f"no kernel for device {tensor.device.type!r}"
    return None


@library.constant_while_tracing
def missing() -> str | None:
    """Load the C++ kernels once; None when they are there, else the reason why not."""
    return _load()


@functools.cache
def _load() -> str | None:
    if not library_path().exists():
        return f"the C++ kernels are not built: {build_info().get('reason', 'no build record')}"
    from fastmt import kept_memory  # noqa: F401  the kernels call an operation that it registers

    try:
        torch.ops.load_library(str(library_path()))
    except (OSError, RuntimeError) as error:
        return f"the C++ kernels do not load: {first_line(error)}"
    library.register_fakes()
    return None


def triton_is_faster(classes: int, loss: str = "") -> bool:
    """Whether up-sampling Triton kernels take less time than CUDA's (benchmarks/gpu_choice).

    CUDA's keep the classes of a pixel in shared memory where their number is not compiled in, and
    have a short cut by powers for "mse", "ce" and the cross-entropy alone.
    """
    return classes not in FIXED_CLASSES or loss in ("kl", "soft_ce", "bce", "js")


def cuda_obstacle(operation: str, tensors: Sequence[Tensor], upsampled: bool) -> str | None:
    """Why the CUDA C++ kernels do not serve a call on these CUDA tensors, if they do not."""
    if reason := cuda_missing():
        return reason
    if operation == "ema_update_":
        return None
    if not upsampled:
        return "the CUDA C++ kernels serve logits that they up-sample"
    if operation == "softmax_confidence":
        if len(tensors) == 1 and tensors[0].shape[1] in FIXED_CLASSES:
            return None
        return "the CUDA C++ kernels score one teacher of 19 or 21 classes"
    if len(tensors) > MAX_TEACHERS + 1:
        reason = f"{len(tensors) - 1} teachers are more than the {MAX_TEACHERS}"
        return f"{reason} of the CUDA C++ kernels"
    return None


@library.constant_while_tracing
def cuda_missing() -> str | None:
    """Load the CUDA C++ kernels once; None when they are there, else the reason why not."""
    return _load_cuda()


@functools.cache
def _load_cuda() -> str | None:
    if reason := missing():
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    kernels = _PACKAGE / "_CUDA.abi3.so"
    if not kernels.exists():
        reason = build_info().get("cuda", {}).get("reason", "no build record")
        return f"the CUDA C++ kernels are not built: {reason}"
    try:
        torch.ops.load_library(str(kernels))
    except (OSError, RuntimeError) as error:
        return f"the CUDA C++ kernels do not load: {first_line(error)}"
    return None


@library.constant_while_tracing
def cuda_launch_obstacle(index: int) -> str | None:
    """Why the CUDA C++ kernels do not run on a device, if they do not: one is launched to see."""
    if torch.cuda.is_current_stream_capturing():
        return None  # nothing of this may become part of a graph
    return _launch(index)


@functools.cache
def _launch(index: int) -> str | None:
    number = torch.ones((), device=torch.device("cuda", index))
    try:
        torch.ops.fastmt.scale_(number.clone(), number, number)
    except RuntimeError as error:
        return f"the CUDA C++ kernels do not run on cuda:{index}: {first_line(error)}"
    return None


def library_path() -> Path:
    """The library of the C++ kernels."""
    return _PACKAGE / "_C.abi3.so"


def build_info() -> dict[str, Any]:
    """What the build recorded: which kernels it left out and why."""
    record = _PACKAGE / "_build_info.json"
    return json.loads(record.read_text()) if record.exists() else {}


@library.constant_while_tracing
def instruction_set() -> str:
    """The instruction set that the C++ kernels run with on this machine."""
    return _instruction_set()


@functools.cache
def _instruction_set() -> str:
    if reason := missing():
        return reason
    return torch.ops.fastmt.instruction_set()
