"""The results of benchmarks.gpu as a table and a plot."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from benchmarks.harness import duration

BASELINES = ("eager", "torch.compile")


def write(result: dict, out: Path) -> None:
    """gpu.md and, where something was timed, gpu.png."""
    text = markdown(result)
    if result["cases"]:
        try:
            plot(result, out / "gpu.png")
        except ImportError as error:
            text += f"\nNo plot: {error}.\n"
    (out / "gpu.md").write_text(text)


def markdown(result: dict) -> str:
    """Checks, one table for each group of cases, and what was left out."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    failed = {name: told for name, told in result["checks"].items() if told is not None}
    lines = [
        f"{result['device']} (compute capability {result['gpu']['capability']}), {versions}; "
        f"{result['date']}, commit {result['commit']}"
        + (" with uncommitted changes" if result["uncommitted_changes"] else ""),
        "",
        f"{len(result['checks']) - len(failed)} of {len(result['checks'])} checks passed.",
        *(f"- FAILED {name}: {told}" for name, told in failed.items()),
    ]
    lines += [
        "",
        f"Medians of {result['rounds']} rounds between CUDA events, in which all variants and a "
        "large copy take turns, each call on other tensors than the caches hold, but for moving "
        "averages, which small ones do hold. GB/s: bytes that have to move "
        "(benchmarks/models.py) by time; of copy: as a part of the copy's in the same "
        "rounds. Memory: peak beyond what is held before the call, the gradient included. A star "
        "marks what auto takes. What is not right in a case is not timed there.",
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


def fused(case: dict) -> list[str]:
    """The names of the variants that are fastmt's."""
    return [name for name in case["variants"] if name not in BASELINES]


def _table(cases: list[dict]) -> list[str]:
    columns = ("time", "GB/s", "of copy", "eager takes", "compile takes", "memory", "launches")
    rows = [f"| case | variant | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for case in cases:
        for name in [*fused(case), *(n for n in BASELINES if n in case["variants"])]:
            own = case["variants"][name]
            takes = ["" if name in BASELINES else _ratio(case, name, other) for other in BASELINES]
            cells = [
                case["name"],
                name + (" *" if name == case["auto"] else ""),
                duration(own["median_s"]),
                f"{own['gb_per_s']:.0f}",
                f"{own['of_copy']:.0%}",
                *takes,
                "-"
                if own["peak_extra_bytes"] is None
                else f"{own['peak_extra_bytes'] / 1e6:.1f} MB",
                "-" if own["launches"] is None else str(own["launches"]),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def _ratio(case: dict, name: str, other: str) -> str:
    if other not in case["variants"]:
        return "-"
    return f"{case['variants'][other]['median_s'] / case['variants'][name]['median_s']:.1f} x"


def plot(result: dict, path: Path) -> None:
    """Fraction of the copy bandwidth, and how often the fused call fits in a baseline's time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(case, name) for case in result["cases"] for name in fused(case)]
    if not rows:
        return
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.2 + 0.35 * len(rows)), sharey=True, layout="constrained"
    )
    places = range(len(rows))[::-1]
    left.barh(places, [case["variants"][name]["of_copy"] for case, name in rows], color="#4477aa")
    left.axvline(1, color="black", linewidth=0.8)
    left.set(title="bytes that have to move, of a copy's rate", xlim=(0, None))
    left.set_yticks(places, [f"{case['name']}, {name}" for case, name in rows])
    for other, marker in zip(BASELINES, "os", strict=True):
        timed = [
            (p, c, n) for p, (c, n) in zip(places, rows, strict=True) if other in c["variants"]
        ]
        takes = [
            c["variants"][other]["median_s"] / c["variants"][n]["median_s"] for _, c, n in timed
        ]
        right.plot(takes, [p for p, _, _ in timed], marker, label=other)
    right.axvline(1, color="black", linewidth=0.8)
    right.set(title="time of a baseline / fused", xscale="log")
    right.grid(alpha=0.3)
    right.legend(frameon=False)
    figure.suptitle(f"{result['device']}, torch {result['versions']['torch']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)
