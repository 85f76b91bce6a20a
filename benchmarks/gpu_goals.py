"""What fastmt sets out to reach on a GPU, judged by what was measured there.

Of a case the variant that `auto` takes is judged, by the time that counts in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.gpu_times import ratio

BANDWIDTH = 0.9  # of a copy's, where all that is done is to move bytes


class Goal(NamedTuple):
    """A bound on a figure of a case; `told` in words."""

    case: str
    told: str
    figure: Callable[[dict], float | None]
    form: str
    limit: float
    most: bool = False

    def judged(self, cases: Sequence[dict]) -> dict[str, object]:
        """As it goes into the results; `met` is None where nothing was measured."""
        case = next((case for case in cases if case["name"] == self.case), None)
        timed = case is not None and case["auto"] in case["variants"]
        measured = self.figure(case) if timed else None
        return {
            "case": self.case,
            "goal": self.told,
            "by": case["auto"] if timed else None,
            "measured": measured,
            "told": "not measured" if measured is None else self.form.format(measured),
            "met": None if measured is None else self._holds(measured),
        }

    def _holds(self, measured: float) -> bool:
        return measured <= self.limit if self.most else measured >= self.limit


def _of_variant(name: str, case: dict) -> float | None:
    return case["variants"][case["auto"]][name]


def _times_faster_than(other: str, case: dict) -> float | None:
    return ratio(case, case["auto"], other)


def _part_of_eagers_memory(case: dict) -> float | None:
    names = (case["auto"], "eager")
    own, eager = (case["variants"].get(n, {}).get("peak_extra_bytes") for n in names)
    return own / eager if own is not None and eager else None


def _bandwidth(case: str) -> Goal:
    told = f"at least {BANDWIDTH:.0%} of a copy's rate"
    return Goal(case, told, partial(_of_variant, "of_copy"), "{:.2%}", BANDWIDTH)


def _speed(case: str, other: str, times: float) -> Goal:
    told = f"{times:g} times as fast as {other}" if times > 1 else f"not slower than {other}"
    return Goal(case, told, partial(_times_faster_than, other), "{:.2f} x", times)


_LARGE, _SMALL = "8x19x1024x1024", "1x19x64x64"
_CELLS = f"consistency {_LARGE} float32 from 1/8"
_AVERAGE = "EMA of 304 M in 296 tensors, float32 student"
GOALS = (
    _bandwidth(f"consistency {_LARGE} bfloat16"),
    _bandwidth(f"confidence {_LARGE} bfloat16"),
    _speed(_CELLS, "eager", 30),
    _speed(_CELLS, "torch.compile", 10),
    Goal(_CELLS, "at most 3% of eager's memory", _part_of_eagers_memory, "{:.2%}", 0.03, True),
    _bandwidth(_AVERAGE),
    Goal(
        _AVERAGE,
        "one launch, its decay on the GPU",
        partial(_of_variant, "launches"),
        "{:g}",
        1,
        True,
    ),
    *(
        _speed(f"{operation} {_SMALL} float32", "eager", 1)
        for operation in ("consistency", "confidence", "cross-entropy")
    ),
)


def judged(cases: Sequence[dict]) -> list[dict[str, object]]:
    """Every goal with what was measured of it."""
    return [goal.judged(cases) for goal in GOALS]


def table(cases: Sequence[dict]) -> list[str]:
    """The same in Markdown."""
    met = {True: "yes", False: "NO", None: "-"}
    rows = ["| case | goal | measured | by | met |", "|---|---|---:|---|---|"]
    for goal in judged(cases):
        cells = (goal["case"], goal["goal"], goal["told"], goal["by"] or "-", met[goal["met"]])
        rows.append(f"| {' | '.join(cells)} |")
    return rows
