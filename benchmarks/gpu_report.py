"""The results of benchmarks.gpu as a table and a plot."""

from __future__ import annotations

import json
import statistics
from itertools import groupby
from pathlib import Path

from benchmarks import gpu_goals, gpu_plot
from benchmarks.gpu_plot import BASELINES, fused
from benchmarks.gpu_times import CALL, DEVICE, ratio
from benchmarks.harness import duration


def begin(out: Path) -> None:
    """Removes the plot of an earlier run, which new figures would not agree with."""
    (out / "gpu.png").unlink(missing_ok=True)


def save(result: dict, out: Path, note: str = "") -> None:
    """gpu.json and gpu.md, each in place of the earlier one as a whole: a run may be cut short."""
    told = result | {"goals": gpu_goals.judged(result["cases"])}
    texts = {"gpu.json": json.dumps(told, indent=1) + "\n", "gpu.md": markdown(result) + note}
    for name, text in texts.items():
        part = out / f"{name}.part"
        part.write_text(text)
        part.replace(out / name)


def write(result: dict, out: Path) -> None:
    """The same and, where something was timed, gpu.png."""
    note = ""
    if result["cases"]:
        try:
            gpu_plot.plot(result, out / "gpu.png")
        except Exception as error:  # figures from a lent GPU are not lost for it
            note = f"\nNo plot: {type(error).__name__}: {error}.\n"
    save(result, out, note)


def markdown(result: dict) -> str:
    """Checks, goals, one table for each group of cases, and what was left out."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    failed = {name: told for name, told in result["checks"].items() if told is not None}
    lines = [
        "fastmt's kernels beside eager PyTorch and torch.compile on one GPU: each checked against "
        "the reference in float64, then timed on the same tensors.",
        "",
        f"{result['device']} (compute capability {result['gpu']['capability']}), {versions}; "
        f"{result['date']}, commit {result['commit']}"
        + (" with uncommitted changes" if result["uncommitted_changes"] else ""),
        "",
        f"{len(result['checks']) - len(failed)} of {len(result['checks'])} checks passed."
        if result["checks"]
        else "No check was run.",
        *(f"- FAILED {name}: {told}" for name, told in failed.items()),
        "",
        "## Goals",
        "",
        *gpu_goals.table(result["cases"]),
        "",
        "## How it was measured",
    ]
    lines += [
        "",
        f"Medians of {result['rounds']} rounds in which all variants and a large copy"
        f"{_rate_of_copies(result['cases'])} take turns, "
        "each call on other tensors than the caches hold, but for moving averages, which small "
        "ones do hold.",
        "",
        "- A case is named by images x classes x height x width and the dtype of the logits; from "
        "1/8: they come at an eighth of height and width. Losses come with their gradient.",
        "- GPU: time of a call there while the host is ahead, as in training; a dash where the "
        "host did not get ahead. Call: in a loop of calls, whichever of host and GPU is slower.",
        "- GB/s: bytes that have to move (benchmarks/models.py) by time; of copy: as a part of the "
        "copy's in the same rounds; takes: the baseline's time by the kernel's. All three go by "
        "the time on the GPU, in the group Small by the call.",
        "- Memory: peak beyond what is held before the call, the gradient included. "
        "What is not right in a case is not timed there.",
        "- triton, cpp: fastmt's kernels in Triton and in CUDA C++; a star marks what a call takes "
        "by itself.",
    ]
    for group, cases in groupby(result["cases"], key=lambda case: case["group"]):
        lines += ["", f"## {group.capitalize()}", "", *_table(list(cases))]
    by_reason: dict[tuple[str, str], list[str]] = {}
    for case in result["cases"]:
        for told in case["left_out"].items():
            by_reason.setdefault(told, []).append(case["name"])
    left_out = [f"- {name}: {why}" for name, why in result["left_out"].items()]
    left_out += [f"- {b}: {why} ({', '.join(names)})" for (b, why), names in by_reason.items()]
    if left_out:
        lines += ["", "Left out:", "", *left_out]
    return "\n".join(lines) + "\n"


def _rate_of_copies(cases: list[dict]) -> str:
    rates = [case["copy_gb_per_s"] for case in cases if case["copy_gb_per_s"] is not None]
    return f" ({statistics.median(rates):.0f} GB/s)" if rates else ""


def _table(cases: list[dict]) -> list[str]:
    columns = ("GPU", "call", "GB/s", "of copy", "eager takes", "compile takes")
    columns += ("memory", "launches")
    rows = [f"| case | variant | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for case in cases:
        for name in [*fused(case), *(n for n in BASELINES if n in case["variants"])]:
            own = case["variants"][name]
            takes = ["" if name in BASELINES else _takes(case, name, other) for other in BASELINES]
            cells = [
                case["name"],
                name + (" *" if name == case["auto"] else ""),
                "-" if own[DEVICE] is None else duration(own[DEVICE]),
                duration(own[CALL]),
                _told(own["gb_per_s"], "{:.0f}"),
                _told(own["of_copy"], "{:.0%}"),
                *takes,
                _told(own["peak_extra_bytes"], "{:.1f} MB", 1e6),
                _told(own["launches"], "{:.0f}"),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def _takes(case: dict, name: str, other: str) -> str:
    return _told(ratio(case, name, other), "{:.1f} x")


def _told(figure: float | None, form: str, unit: float = 1) -> str:
    return "-" if figure is None else form.format(figure / unit)
