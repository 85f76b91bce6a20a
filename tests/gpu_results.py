"""Results of benchmarks.gpu, as if a GPU had been measured, and runs of it without one."""

from __future__ import annotations

import torch

from benchmarks import gpu, gpu_cases, gpu_checks, machine


def without_a_gpu(monkeypatch):
    """The parts of a run that ask a GPU, answered for a CPU; and no case or check of its own."""
    monkeypatch.setattr(machine, "gpu", lambda device: {"capability": "9.0"})
    monkeypatch.setattr(gpu_checks, "checks", lambda device: {"one": lambda device: None})
    monkeypatch.setattr(gpu_cases, "cases", list)


def run(**options):
    nothing = {name: lambda result: None for name in ("save", "write")}
    options = {"only": "", "with_compile": False, **nothing, **options}
    return gpu.run(torch.device("cpu"), options.pop("clock", gpu.Clock(8)), **options)


def result(*cases):
    versions = {"fastmt": "1", "torch": "2"}
    of_run = {"device": "a GPU", "gpu": {"capability": "9.0"}, "versions": versions, "date": "now"}
    of_run |= {"commit": "c0ffee", "uncommitted_changes": False, "rounds": 15}
    return {**of_run, "checks": {"one": None}, "left_out": {}, "cases": [*cases]}


def case(name, group, fused, compile_s=2e-3, left_out=None, counts="device_s", eager_s=1e-2):
    """A case whose calls take a tenth of a millisecond more than the GPU."""

    def variant(seconds, launches):
        device, call = (None, 1e-3) if seconds is None else (seconds, seconds + 1e-4)
        counted = call if counts == "call_s" else device
        return {
            "device_s": device,
            "call_s": call,
            "gb_per_s": counted and 1 / counted,
            "of_copy": counted and 1e-3 / counted,
            "launches": launches,
            "peak_extra_bytes": 5_000_000,
            "error": 1e-7,
            "samples": {"device_s": [device] if device else [], "call_s": [call]},
        }

    compiled = {} if compile_s is None else {"torch.compile": compile_s}
    times = {"eager": eager_s, **compiled, **fused}
    return {
        "name": name,
        "group": group,
        "auto": "triton",
        "reasons": {},
        "left_out": left_out or {},
        "bytes": 10**9,
        "counts": counts,
        "copy_gb_per_s": 1000.0,
        "variants": {n: variant(s, 3) for n, s in times.items()},
    }
