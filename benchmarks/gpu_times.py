"""Two times of a call on a GPU: of the work there with the host ahead, and of a loop of calls.

In training the host runs ahead of the GPU, so what a large call costs is the time on the GPU. A
loop of calls measures that only where the host is quick enough; of small calls, which the host
cannot hand over as fast as they end, the loop is what training waits for.

To have the host ahead, a sample begins with a kernel that spins while its calls are queued. If the
spin ends before the last of them is in the queue, the sample is none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import harness, machine

DEVICE, CALL = "device_s", "call_s"
_QUEUE = 800  # launches of a sample: with about 1000 in its queue the host has to wait
_UNKNOWN_LAUNCHES = 32  # of a call, where the profiler may not count them
_TRIES = 4  # of a sample, each with a longer spin and fewer calls
_LONGEST_SPIN = 0.1
_CYCLES = 2_000_000  # whose time is taken: about a millisecond


@dataclass(frozen=True)
class Times:
    """Seconds per call, one figure a round; of the device none of a round that had no sample."""

    device_s: list[float]
    call_s: list[float]

    def median(self, which: str) -> float | None:
        samples = getattr(self, which)
        return statistics.median(samples) if samples else None


def ratio(case: dict, name: str, other: str) -> float | None:
    """Another variant's time by this one's, in the time that counts; None where one has none."""
    times = [case["variants"].get(variant, {}).get(case["counts"]) for variant in (other, name)]
    return None if None in times else times[0] / times[1]


def interleave(
    runs: dict[str, Callable[[], object]],
    launches: dict[str, int | None],
    device: torch.device,
    *,
    rounds: int,
    sample_seconds: float,
) -> dict[str, Times]:
    """Both times of each run, taken in turns; on a CPU they are one."""
    samplers: dict[tuple[str, str], Callable[[], float | None]] = {}
    speed = cycles_per_second() if device.type == "cuda" else None
    for name, run in runs.items():
        samplers[name, CALL] = harness.sampler(run, device, sample_seconds)
        if speed:
            ahead = HostAhead(run, launches[name], device, speed, sample_seconds)
            samplers[name, DEVICE] = ahead.sample
    samples = harness.in_turns(samplers, rounds)
    return {
        name: Times(
            [seconds for seconds in samples.get((name, DEVICE), calls) if seconds is not None],
            calls,
        )
        for name in runs
        for calls in [samples[name, CALL]]
    }


def cycles_per_second() -> float:
    """How fast the spin counts."""
    torch.cuda._sleep(1)  # a kernel's first launch loads it
    begin, end = _events()
    begin.record()
    torch.cuda._sleep(_CYCLES)
    end.record()
    end.synchronize()
    return _CYCLES / (begin.elapsed_time(end) / 1e3)


class HostAhead:
    """Samples of a call's time on the GPU, as long as the host manages to get ahead.

    A sample has as many calls as fit in the queue, in a quarter of `sample_seconds` on the GPU and,
    together with the spin, in all of it on the host.
    """

    def __init__(
        self,
        run: Callable[[], object],
        launches: int | None,
        device: torch.device,
        cycles_per_second: float,
        sample_seconds: float,
    ) -> None:
        self._run, self._device, self._speed = run, device, cycles_per_second
        self._failed = False
        host = statistics.median(self._host_seconds() for _ in range(3))
        self._plan(1, host)
        once = self.sample()
        if once is not None:
            most = (
                _QUEUE / (launches or _UNKNOWN_LAUNCHES),
                sample_seconds / 4 / max(once, 1e-9),
                sample_seconds / 2 / max(host, 1e-9),
            )
            self._plan(max(1, int(min(most))), host)

    def sample(self) -> float | None:
        """Seconds per call; None, and so for good, where the host did not get ahead."""
        calls, spin = self._calls, self._spin
        for _ in range(0 if self._failed else _TRIES):
            seconds = self._once(calls, spin)
            if seconds is not None:
                return seconds
            calls, spin = max(1, calls // 2), min(2 * spin, _LONGEST_SPIN)
        self._failed = True
        return None

    def _plan(self, calls: int, host: float) -> None:
        self._calls, self._spin = calls, min(1.5 * host * calls + 5e-4, _LONGEST_SPIN)

    def _host_seconds(self) -> float:
        machine.synchronize(self._device)
        begin = time.perf_counter()
        self._run()
        return time.perf_counter() - begin

    def _once(self, calls: int, spin: float) -> float | None:
        machine.synchronize(self._device)
        begin, end = _events()
        torch.cuda._sleep(int(spin * self._speed))
        begin.record()
        for _ in range(calls):
            self._run()
        end.record()
        ahead = not begin.query()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls if ahead else None


def _events() -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(2)]
