"""Launch once what the benchmarks launch, on a stub of a GPU, for Triton to compile it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import aot, gpu_cases, gpu_checks, harness
from benchmarks.gpu_choice import run as gpu_choice
from fastmt.kernels import launch


class Once:
    """In the place of gpu_choice's timer: what is timed there runs once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, name: str, run: Callable[[], object], nbytes: int) -> None:
        attempt(name, run)


def attempt(name: str, run: Callable[[], object]) -> None:
    """On the stub all results are wrong, and CUDA's own kernels do not start."""
    try:
        run()
        told = "launched"
    except Exception as error:
        told = harness.told(error)
    print(f"{name}: {told}", flush=True)


def main() -> None:
    device = torch.device("cuda", 0)
    launch.registers_of = aot.registers_of  # the stub knows of none
    for case in gpu_cases.cases():
        if case.group == "moving average":  # a table that the host waits for
            continue
        work = case.build(device, False)
        if "triton" in work.variants:
            attempt(case.name, work.runner("triton"))
    for name, check in gpu_checks.checks(device).items():
        attempt(name, lambda check=check: check(device))
    once = Once(device)
    for part in (gpu_choice.dense, gpu_choice.many_classes, gpu_choice.channels_last):
        part(once)
    gpu_choice.cells(once)


if __name__ == "__main__":
    main()
