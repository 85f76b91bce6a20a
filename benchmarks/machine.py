"""What this machine is, how fast it copies, how much memory a call takes."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

import fastmt
from benchmarks import models
from fastmt import cpp_backend, kept_memory

COPY_BYTES = 256 << 20  # of each buffer, far beyond every cache
_ROOT = Path(__file__).parents[1]
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def no_gpu() -> str | None:
    """Why nothing can be measured on a GPU, in one line."""
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda or torch.version.hip
    why = "no device is visible" if built else "this torch is built without CUDA"
    return f"no GPU: {why} (torch {torch.__version__})"


def copy(device: torch.device, size: int = COPY_BYTES) -> tuple[Callable[[], object], int]:
    """A call that copies `size` bytes between two buffers, and the bytes that it moves."""
    source = torch.ones(size // 4, device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source), models.copy(source)


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Memory that one run of `call` takes at its peak beyond what is held before it.

    On CPU the kernel's record of this process's largest resident size (VmHWM), which is set back
    before the call; memory that malloc or fastmt keeps for later is handed back first, so that it
    counts again. On a GPU the peak of PyTorch's allocator. None where the system keeps no such
    record.
    """
    synchronize(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _RESET.exists() else None
    if trim is None:
        return None
    kept_memory.release()
    trim(0)
    _RESET.write_text("5")
    before = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def launches(call: Callable[[], object]) -> int | None:
    """Kernels that one run of `call` starts on a GPU, after one that warms up.

    None where the profiler is not allowed to see any.
    """
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    # There is one cycle, so nothing to accumulate: without it some versions warn that they do not.
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    on_device = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device) or None


def _status_bytes(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())[1]) * 1024


def record(device: torch.device) -> dict[str, object]:
    """Device, versions, date and commit of a run."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "instruction_set": cpp_backend.instruction_set(),
        "build": cpp_backend.build_info(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {
            "fastmt": fastmt.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version_of("triton"),
            "ema-pytorch": _version_of("ema-pytorch"),
            "python": platform.python_version(),
        },
    }


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu(device: torch.device) -> dict[str, object]:
    """What bounds a kernel on this GPU."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": getattr(properties, "L2_cache_size", None),
    }


def cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return "{model name} (family {cpu family} model {model})".format_map(fields)


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
