"""Interleaved timing of several implementations of one operation, after a check of each.

A comparison runs in one process: every round times each variant once and a plain copy besides, in
an order that turns from round to round, so that a slow spell of the machine meets all of them. A
ratio is the median of the rounds' ratios. A gradient is allocated anew in each call and dropped at
its end, as `zero_grad(set_to_none=True)` does in training, and both count for the call that made
it: giving a large one back to the system takes long enough to spoil the next variant's time.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

import fastmt
from benchmarks import machine
from fastmt.backends import Choice
from fastmt.selftest import TOLERANCE as TOLERANCE
from fastmt.selftest import error

FUSED, COPY = "fused", "copy"
Name, Sample = TypeVar("Name"), TypeVar("Sample")


class WrongResult(RuntimeError):
    """A variant does not compute what the reference does, so its time means nothing."""


@dataclass(frozen=True)
class Work:
    """One comparison with its tensors, ready to run."""

    variants: dict[str, Callable[[], Sequence[Tensor]]]  # each returns what it computed
    expected: Callable[[], Sequence[Tensor]]  # the same from the reference
    tolerance: float  # largest error, relative to the largest value of the tensor
    bytes: int  # of the byte model
    choice: Choice  # which implementation "fused" is, and why
    leaves: tuple[Tensor, ...] = ()  # their gradients are dropped at the end of each call
    reset: Callable[[], None] = lambda: None  # undoes what calls have written, before a check
    facts: dict[str, float] = field(default_factory=dict)

    def runner(self, name: str) -> Callable[[], Sequence[Tensor]]:
        """The variant as it is timed: its gradient goes with its result."""
        call = self.variants[name]

        def run() -> Sequence[Tensor]:
            result = call()
            for leaf in self.leaves:
                leaf.grad = None
            return result

        return run


@dataclass(frozen=True)
class Case:
    """A comparison to make: `build(device, compiled)` makes its tensors when its turn comes."""

    name: str
    group: str  # cases of one group share a table
    build: Callable[[torch.device, bool], Work]
    compiled: bool = False  # also against torch.compile
    forced: bool = False  # the kernels even where auto would take eager


def compiled(function: Callable, wanted: bool) -> dict[str, Callable]:
    """{"torch.compile": the compiled function}, or nothing where it is not wanted."""
    return {"torch.compile": torch.compile(function, dynamic=False)} if wanted else {}


def check(work: Work, names: Sequence[str] | None = None) -> dict[str, float]:
    """The error of each variant relative to the reference; WrongResult where one is too large."""
    expected = work.expected()
    errors = {}
    for name in work.variants if names is None else names:
        work.reset()
        actual = work.runner(name)()
        if len(actual) != len(expected):
            raise WrongResult(f"{name}: returned {len(actual)} tensors, expected {len(expected)}")
        errors[name] = max(map(error, actual, expected), default=0.0)
        if not errors[name] <= work.tolerance:  # also where the error is NaN
            raise WrongResult(
                f"{name}: error {errors[name]:.3g} of the largest value, expected at most "
                f"{work.tolerance:g}; not timed"
            )
    return errors


def right_ones(work: Work) -> tuple[dict[str, float], dict[str, str]]:
    """The errors of the variants that are right, and why the others are not; one has to be."""
    expected = work.expected()
    known = replace(work, expected=lambda: expected)
    errors, failed, last = {}, {}, None
    for name in work.variants:
        try:
            errors |= check(known, [name])
        except Exception as error:
            failed[name], last = told(error), error
            print(f"FAILED {name}: {failed[name]}", file=sys.stderr, flush=True)
    if last is not None and not errors:
        raise last
    return errors, failed


def told(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def interleave(
    runs: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    sample_seconds: float,
) -> dict[str, list[float]]:
    """Seconds per call of each run, one figure a round; short calls repeat to `sample_seconds`."""
    samplers = {name: sampler(run, device, sample_seconds) for name, run in runs.items()}
    return in_turns(samplers, rounds)


def in_turns(samplers: dict[Name, Callable[[], Sample]], rounds: int) -> dict[Name, list[Sample]]:
    """One sample of each in every round, in an order that turns."""
    samples: dict[Name, list[Sample]] = {name: [] for name in samplers}
    names = list(samplers)
    gc.collect()
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(samplers[name]())
    return samples


def sampler(
    run: Callable[[], object], device: torch.device, sample_seconds: float
) -> Callable[[], float]:
    """A call that times as many runs, one after the other, as take `sample_seconds`."""
    for _ in range(2):
        run()
    once = min(_seconds(run, device, 1) for _ in range(3))
    return partial(_seconds, run, device, max(1, round(sample_seconds / once)))


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    machine.synchronize(device)
    if device.type == "cuda":
        return _device_seconds(run, repeats)
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def _device_seconds(run: Callable[[], object], repeats: int) -> float:
    """Between two events of the stream: what a loop of calls takes on the device, gaps included."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def measure(
    case: Case,
    device: torch.device,
    *,
    with_compile: bool = True,
    rounds: int = 15,
    sample_seconds: float = 0.02,
    copy_bytes: int = machine.COPY_BYTES,
) -> dict[str, object]:
    """Check one case, then its times, ratios, rates and memory as they go into a result file.

    A variant that is wrong or fails is left out; the fused one raises.
    """
    if case.compiled and with_compile:
        torch.compiler.reset()  # cases share functions, and recompilations are limited
    with fastmt.backend(_forced_backend(device) if case.forced else "auto"):
        work = case.build(device, case.compiled and with_compile)
        errors, failed = right_ones(work)
        if FUSED not in errors:
            raise WrongResult(failed[FUSED])
        memory = {name: _peak(work, name, device) for name in errors}
        copy, copied = machine.copy(device, copy_bytes)
        runs = {**{name: work.runner(name) for name in errors}, COPY: copy}
        seconds = interleave(runs, device, rounds=rounds, sample_seconds=sample_seconds)
    copies = seconds.pop(COPY)
    return {
        "name": case.name,
        "group": case.group,
        "backend": work.choice.backend,
        "reason": work.choice.reason,
        "bytes": work.bytes,
        "left_out": failed,
        "facts": work.facts,
        "copy_gb_per_s": copied / statistics.median(copies) / 1e9,
        "fused_gb_per_s": work.bytes / statistics.median(seconds[FUSED]) / 1e9,
        "fraction_of_copy": _median_ratio(copies, seconds[FUSED]) * work.bytes / copied,
        "ratios": {n: _median_ratio(s, seconds[FUSED]) for n, s in seconds.items() if n != FUSED},
        "variants": {
            name: {
                "median_s": statistics.median(samples),
                "error": errors[name],
                "peak_extra_bytes": memory[name],
                "samples_s": samples,
            }
            for name, samples in seconds.items()
        },
        "copy_samples_s": copies,
    }


def duration(seconds: float) -> str:
    """Seconds as tables show them."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _forced_backend(device: torch.device) -> str:
    return "triton" if device.type == "cuda" else "cpp"


def _median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


def _peak(work: Work, name: str, device: torch.device) -> int | None:
    run = work.runner(name)
    run()
    return machine.peak_extra_bytes(run, device)


def parametrize(*arguments: object, **options: object) -> Callable[[Callable], Callable]:
    """pytest.mark.parametrize; nothing where there is no pytest and only a report is made."""
    try:
        import pytest
    except ImportError:
        return lambda function: function
    return pytest.mark.parametrize(*arguments, **options)


def benchmark_variant(benchmark, case: Case, variant: str) -> None:
    """One pytest-benchmark measurement, after the check of the variant."""
    import pytest

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = case.build(device, False)
    if variant not in work.variants:
        pytest.skip(f"{variant} does not serve {case.name} here")
    check(work, [variant])
    benchmark.group = case.name
    benchmark.extra_info["bytes"] = work.bytes
    run = work.runner(variant)

    def timed() -> None:
        run()
        machine.synchronize(device)

    benchmark(timed)
