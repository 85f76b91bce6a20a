"""What calls on a GPU cost their host, without a GPU: on a stub, whose kernels do nothing.

    python -m benchmarks.host            # with a PyTorch that is built for CUDA 13, half a minute

Of a small call this is most of the time. What the driver takes for each launch comes to it. Writes
benchmarks/results/cuda-host.json and .md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

import fastmt
from benchmarks import gpu_cases, harness, machine

RESULTS = Path(__file__).parent / "results"
CASES = ("1x19x64x64", "in 161 tensors", "in 1000 tensors")
ROUNDS = 41
FALLBACK = "reference"  # fastmt's own eager backend


def measure(case: harness.Case, device: torch.device, rounds: int) -> dict[str, object]:
    """Microseconds of the host and launches, of every variant of a case."""
    work = case.build(device, False)
    runs = {name: work.runner(name) for name in work.variants}
    if case.group == "small":
        runs[FALLBACK] = partial(_in_eager, runs[work.choice.backend])
    launches = {name: _launches(run) for name, run in runs.items()}
    samples = harness.interleave(runs, device, rounds=rounds, sample_seconds=0.02)
    return {
        "name": case.name,
        "auto": work.choice.backend,
        "variants": {
            name: {"host_us": 1e6 * statistics.median(seconds), "launches": launches[name]}
            for name, seconds in samples.items()
        },
    }


def _in_eager(run: Callable[[], object]) -> object:
    with fastmt.backend("eager"):
        return run()


def _launches(run: Callable[[], object]) -> int:
    for _ in range(3):  # the first ones compile
        run()
    count = ctypes.CDLL(None).launches_so_far
    before = count()
    run()
    return count() - before


def markdown(result: dict) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items() if value)
    lines = [
        f"{result['processor']}; {versions}; {result['date']}, commit {result['commit']}",
        "",
        "Host time of a call, gradient included, on a stub of a GPU whose kernels do nothing; "
        f"medians of {result['rounds']} rounds in which the variants take turns. What the driver "
        "takes for each launch comes to it. A star marks what auto takes; the reference is what it "
        "would take instead.",
        "",
        "| case | variant | host | launches |",
        "|---|---|---:|---:|",
    ]
    for case in result["cases"]:
        for name, own in case["variants"].items():
            star = " *" if name == case["auto"] else ""
            figures = f"{own['host_us']:.1f} us | {own['launches']}"
            lines.append(f"| {case['name']} | {name}{star} | {figures} |")
    return "\n".join(lines) + "\n"


def run(rounds: int) -> dict[str, object]:
    device = torch.device("cuda")
    cases = [case for case in gpu_cases.cases() if any(name in case.name for name in CASES)]
    return {
        **machine.record(device),
        "processor": machine.cpu_name(),
        "rounds": rounds,
        "cases": [measure(case, device, rounds) for case in cases],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULTS / "cuda-host.json")
    options = parser.parse_args(arguments)
    if not hasattr(ctypes.CDLL(None), "launches_so_far"):  # of the stub
        own = sys.argv[1:] if arguments is None else arguments
        command = ["-m", "benchmarks.stub_gpu", "-m", "benchmarks.host", *own]
        return subprocess.run([sys.executable, *command], check=False).returncode
    result = run(options.rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
