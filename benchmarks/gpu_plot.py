"""The plot of benchmarks.gpu: a row of panels for each group of cases.

On the left how many times as fast as a baseline a kernel is; on the right what bounds the group:
the part of a copy's bandwidth where memory does, else the time.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_goals import BANDWIDTH
from benchmarks.gpu_times import CALL, ratio
from benchmarks.harness import duration

BASELINES = ("eager", "torch.compile")
_BY_BANDWIDTH = ("dense", "moving average")  # groups
_MARKERS = {"eager": ("o", "#4477aa"), "torch.compile": ("D", "#cc3311")}
_COLORS = {"triton": "#66aadd", "cpp": "#ee9955"}
_NAMES = {"triton": "Triton", "cpp": "CUDA C++"}
_TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_TITLE = {"loc": "left", "fontsize": 10}
_ROW, _PANEL = 0.27, 0.7  # inches: of a kernel, and around a panel


class Row(NamedTuple):
    """One kernel of a case."""

    case: dict
    name: str
    label: str


def fused(case: dict) -> list[str]:
    """The names of the variants that are fastmt's."""
    return [name for name in case["variants"] if name not in BASELINES]


def plot(result: dict, path: Path) -> None:
    """Write the plot; nothing where no kernel of fastmt was timed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {
        group: [Row(case, *labelled) for case in cases for labelled in _labelled(case)]
        for group, cases in groupby(result["cases"], key=lambda case: case["group"])
    }
    groups = {group: rows for group, rows in groups.items() if rows}
    if not groups:
        return
    heights = [_PANEL + _ROW * len(rows) for rows in groups.values()]
    figure, panels = plt.subplots(
        len(groups),
        2,
        figsize=(12.5, 0.8 + sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    limits = _limits([row for rows in groups.values() for row in rows])
    for (left, right), (group, rows) in zip(panels, groups.items(), strict=True):
        _ratios(left, rows, limits)
        left.set_title(f"{group.capitalize()}: times as fast as a baseline", **_TITLE)
        (_rates if group in _BY_BANDWIDTH else _times)(right, rows)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, title="baselines", loc="outside upper right", ncols=2, frameon=False
    )
    what = f"fastmt's kernels on {result['device']}, torch {result['versions']['torch']}"
    figure.suptitle(
        f"{what}\n(auto): what a call takes by itself; dashed: the goal",
        x=0.02,
        ha="left",
        fontsize=11,
    )
    figure.get_layout_engine().set(w_pad=0.1)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _labelled(case: dict) -> list[tuple[str, str]]:
    """Each kernel with its label; the case is named once."""
    names = fused(case)
    told = {n: _NAMES.get(n, n) + (" (auto)" if n == case["auto"] else "") for n in names}
    return [(n, f"{case['name']},  {told[n]}" if n == names[0] else told[n]) for n in names]


def _limits(rows: list[Row]) -> tuple[float, float]:
    """Between which all ratios lie, and 1."""
    found = [ratio(row.case, row.name, baseline) for row in rows for baseline in BASELINES]
    told = [1, *(r for r in found if r is not None)]
    return 0.6 * min(told), 1.6 * max(told)


def _ratios(axes: Any, rows: list[Row], limits: tuple[float, float]) -> None:
    places = range(len(rows))[::-1]
    for baseline, (marker, color) in _MARKERS.items():
        found = [ratio(row.case, row.name, baseline) for row in rows]
        told = [(r, place) for r, place in zip(found, places, strict=True) if r is not None]
        axes.plot(
            [r for r, _ in told], [p for _, p in told], marker, color=color, label=baseline, ms=6
        )
        for r, place in told:
            offset = (0, 5) if baseline == "eager" else (0, -11)
            axes.annotate(
                f"{r:.1f}", (r, place), offset, textcoords="offset points", fontsize=7, ha="center"
            )
    axes.axvline(1, color="black", linewidth=0.8)
    ticks = [tick for tick in _TICKS if limits[0] <= tick <= limits[1]]
    axes.set(xscale="log", xlim=limits, ylim=(-0.7, len(rows) - 0.3))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(places, [row.label for row in rows], fontsize=9)
    axes.grid(alpha=0.3, axis="x")


def _rates(axes: Any, rows: list[Row]) -> None:
    rates = [row.case["variants"][row.name]["of_copy"] for row in rows]
    _bars(axes, rows, [100 * (rate or 0) for rate in rates], "{:.0f} %".format)
    axes.axvline(100, color="black", linewidth=0.8, zorder=0)
    axes.axvline(100 * BANDWIDTH, color="black", linewidth=0.8, linestyle="--", zorder=2)
    axes.set_xlim(0, max([115, *(115 * (rate or 0) for rate in rates)]))
    axes.set_title("bytes that have to move, % of a copy's rate", **_TITLE)


def _times(axes: Any, rows: list[Row]) -> None:
    counts = rows[0].case["counts"]
    times = [row.case["variants"][row.name][counts] or 0 for row in rows]
    _bars(axes, rows, [1e3 * seconds for seconds in times], lambda ms: duration(ms / 1e3))
    axes.set_xlim(0, 1.2e3 * max(times) or 1)
    what = "time of a call" if counts == CALL else "kernel's time on the GPU"
    axes.set_title(f"{what}, ms", **_TITLE)


def _bars(axes: Any, rows: list[Row], values: list[float], told: Callable) -> None:
    places = range(len(rows))[::-1]
    colors = [_COLORS.get(row.name, "#999999") for row in rows]
    bars = axes.barh(places, values, color=colors)
    labels = axes.bar_label(bars, [told(v) if v else "-" for v in values], padding=4, fontsize=8)
    for label in labels:
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    axes.set(ylim=(-0.7, len(rows) - 0.3))
    axes.set_yticks(places, [])
