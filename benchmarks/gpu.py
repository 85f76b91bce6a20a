"""Check and time everything on a GPU, in at most eight minutes: JSON, a table and a plot.

python -m benchmarks.gpu --out DIR [--only TEXT] [--no-compile] [--minutes 7]

Only what gives the reference's result in the very case is timed, on the GPU and as a call
(gpu_times). GPUs are lent for minutes: the times come first, then checks of options, of graphs and
of waits for half of what is left, and last the cases anew with torch.compile. A check or case that
fails spoils no other. What is left out has its reason in the results, written after each step.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu_cases, gpu_checks, gpu_report, gpu_times, harness, machine
from benchmarks.harness import COPY, Case

ROUNDS = 15
HOST_BOUND = ("small",)  # groups in which the time of the call counts, not that on the GPU
MINUTES = 7  # after which nothing begins
_SECONDS_TO_COMPILE = 60  # that the first case with torch.compile may need
_LEAST_SECONDS_TO_COMPILE = 30  # and any later one, a quarter more than the longest before it
_MINUTES_TO_END = 1  # that what has begun in time may take beyond it


class Clock:
    """The time that is left of a number of minutes."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self._end = minutes, time.monotonic() + 60 * minutes

    def left(self) -> float:
        return self._end - time.monotonic()


def verify(
    checks: dict[str, Callable],
    device: torch.device,
    save: Callable = lambda results: None,
    has_time: Callable[[], bool] = lambda: True,
) -> dict[str, str | None]:
    """Run checks; None, or in one line what is wrong. One that never ends is saved as such."""
    results: dict[str, str | None] = {}
    for name, check in checks.items():
        if not has_time():
            break
        results[name] = "did not end"
        save(results)
        try:
            check(device)
            results[name] = None
        except Exception as error:
            results[name] = harness.told(error)
            print(f"FAILED {name}: {results[name]}", file=sys.stderr, flush=True)
    return results


def measure(
    case: Case,
    device: torch.device,
    *,
    with_compile: bool = True,
    rounds: int = ROUNDS,
    sample_seconds: float = 0.02,
    copy_bytes: int = machine.COPY_BYTES,
) -> dict[str, object]:
    """Check one case, then time its variants in turns, a large copy among them."""
    if case.compiled and with_compile:
        torch.compiler.reset()
    work = case.build(device, case.compiled and with_compile)
    errors, failed = harness.right_ones(work)
    copy, copied = machine.copy(device, copy_bytes)
    runs = {**{name: work.runner(name) for name in errors}, COPY: copy}
    memory = {name: machine.peak_extra_bytes(run, device) for name, run in runs.items()}
    launches = {name: _launches(run, device) for name, run in runs.items()}
    times = gpu_times.interleave(
        runs, launches, device, rounds=rounds, sample_seconds=sample_seconds
    )
    counts = gpu_times.CALL if case.group in HOST_BOUND else gpu_times.DEVICE
    copy_rate = _rate(copied, times.pop(COPY).median(counts))
    return {
        "name": case.name,
        "group": case.group,
        "auto": work.choice.backend,
        "reasons": {name: choice.reason for name, choice in work.choices.items()},
        "left_out": work.left_out | failed,
        "bytes": work.bytes,
        "counts": counts,
        "copy_gb_per_s": copy_rate,
        "variants": {
            name: {
                gpu_times.DEVICE: own.median(gpu_times.DEVICE),
                gpu_times.CALL: own.median(gpu_times.CALL),
                "gb_per_s": (rate := _rate(work.bytes, own.median(counts))),
                "of_copy": rate and copy_rate and rate / copy_rate,
                "launches": launches[name],
                "peak_extra_bytes": memory[name],
                "error": errors[name],
                "samples": dataclasses.asdict(own),
            }
            for name, own in times.items()
        },
    }


def _rate(nbytes: int, seconds: float | None) -> float | None:
    """GB/s."""
    return None if seconds is None else nbytes / seconds / 1e9


def _launches(run: Callable, device: torch.device) -> int | None:
    return machine.launches(run) if device.type == "cuda" else None


def run(
    device: torch.device,
    clock: Clock,
    *,
    only: str,
    with_compile: bool,
    save: Callable,
    write: Callable,
) -> dict[str, object]:
    """Cases, then checks; `save(result)` after each step, so that nothing is lost.

    `write(result)` plots what is saved too, wherever it is of use by itself.
    """
    result: dict[str, object] = {**machine.record(device), "gpu": machine.gpu(device)}
    result |= {"rounds": ROUNDS, "minutes": clock.minutes}
    result |= {"checks": {}, "cases": [], "left_out": {}}
    cases = [case for case in gpu_cases.cases() if only in case.name]
    for case in cases:
        attempt(result, case, device, clock, save, with_compile=False)
    write(result)
    _check(result, device, clock, save, spare=_spared(clock.left()) if with_compile else 0)
    # Then anew with torch.compile, as many as there is time for, what fastmt is for first: a case
    # without it says more than none.
    headline = sorted(cases, key=lambda case: case.group != "up-sampled")
    needed, longest = _SECONDS_TO_COMPILE, 0.0
    for case in headline if with_compile else ():
        if case.compiled and any(done["name"] == case.name for done in result["cases"]):
            before = clock.left()
            if attempt(result, case, device, clock, save, with_compile=True, needed=needed):
                write(result)
                longest = max(longest, before - clock.left())
                needed = max(_LEAST_SECONDS_TO_COMPILE, 1.25 * longest)
    write(result)
    return result


def _spared(left: float) -> float:
    """Seconds that checks leave torch.compile: half, but enough for its first case; or none."""
    needed = 1.1 * _SECONDS_TO_COMPILE  # a check that begins in time takes some of it
    return max(left / 2, needed) if left >= 1.5 * needed else 0


def _check(
    result: dict[str, object], device: torch.device, clock: Clock, save: Callable, *, spare: float
) -> None:
    """Checks, until no more than the seconds to spare are left."""
    print(f"checks, {clock.left():.0f} s left", file=sys.stderr, flush=True)
    try:
        checks = gpu_checks.checks(device)  # makes tensors, which fails after a kernel's fault
    except Exception as error:
        checks = {"checks": partial(_raise, error)}
    result["checks"] = verify(
        checks,
        device,
        lambda done: save(result | {"checks": done}),
        lambda: clock.left() > max(spare, 0),
    )
    if late := len(checks) - len(result["checks"]):
        told = "no time was left for them; tests/gpu has them all"
        result["left_out"][f"{late} of {len(checks)} checks"] = told
    save(result)


def _raise(error: Exception, device: torch.device) -> None:
    raise error


def attempt(
    result: dict[str, object],
    case: Case,
    device: torch.device,
    clock: Clock,
    save: Callable,
    *,
    with_compile: bool,
    needed: float = 0,
) -> bool:
    """Measure a case in place of what is known of it, or say why not; whether it was begun.

    What is known stays until all of it is measured anew: a variant that then fails has its reason.
    One that never ends is saved as such.
    """
    name = f"{case.name}, torch.compile" if with_compile else case.name
    if clock.left() < needed:
        result["left_out"][name] = f"the {clock.minutes:g} minutes are over"
        return False
    print(f"{name}, {clock.left():.0f} s left", file=sys.stderr, flush=True)
    result["left_out"][name] = "did not end"
    save(result)
    try:
        torch.cuda.empty_cache()  # raises after a kernel's fault, as everything does from then on
        measured = measure(case, device, with_compile=with_compile)
        known = {done["name"]: done for done in result["cases"]}
        before = known.get(case.name, {"variants": {}})
        lost = [v for v in before["variants"] if v not in measured["variants"]]
        if lost:
            result["left_out"][name] = measured["left_out"][lost[0]]
        else:
            result["cases"] = [*(known | {case.name: measured}).values()]
            del result["left_out"][name]
    except Exception as error:
        result["left_out"][name] = harness.told(error)
    save(result)
    return True


def exit_status(result: dict[str, object]) -> int:
    """1 where a check failed or a result was wrong."""
    places = [result["left_out"], *(case["left_out"] for case in result["cases"])]
    wrong = (told.startswith("WrongResult") for place in places for told in place.values())
    return int(any(result["checks"].values()) or any(wrong))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="when to stop")
    options = parser.parse_args(arguments)
    if reason := machine.no_gpu():
        print(f"benchmarks.gpu: error: {reason}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    gpu_report.begin(options.out)
    # A kernel that hangs cannot be left out: this tells where it does, and what was saved stays.
    faulthandler.dump_traceback_later(60 * (options.minutes + _MINUTES_TO_END), exit=True)
    try:
        result = run(
            torch.device("cuda", torch.cuda.current_device()),
            Clock(options.minutes),
            only=options.only,
            with_compile=not options.no_compile,
            save=partial(gpu_report.save, out=options.out),
            write=partial(gpu_report.write, out=options.out),
        )
    finally:
        faulthandler.cancel_dump_traceback_later()
    print(gpu_report.markdown(result))
    return exit_status(result)


if __name__ == "__main__":
    sys.exit(main())
