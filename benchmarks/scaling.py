"""Time and memory against the image's size, the logits at 1/8 of it: JSON, a table and a plot.

python -m benchmarks.scaling [--sides 256 512 1024 2048] [--out benchmarks/results/scaling.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import bench_consistency, breakdown, harness, machine
from benchmarks.report import RESULTS
from benchmarks.shapes import SIDES, Shape

STRIDE = 8
BATCH, CLASSES = 2, 19


def run(sides: Sequence[int], *, rounds: int, with_compile: bool = True) -> dict[str, object]:
    """Measure consistency with its gradient at every side, then where the time goes at 512."""
    device = torch.device("cpu")
    result: dict[str, object] = {"rounds": rounds, "stride": STRIDE, **machine.record(device)}
    result["cases"] = []
    for side in sides:
        print(f"{side} x {side}", file=sys.stderr, flush=True)
        case = bench_consistency.upsampled(Shape(BATCH, CLASSES, (side, side)), STRIDE)
        measured = harness.measure(case, device, with_compile=with_compile, rounds=rounds)
        result["cases"].append({"side": side, **measured})
    result["breakdown"] = breakdown.measure(rounds=rounds)
    return result


def markdown(result: dict[str, object]) -> str:
    """The figures as tables."""
    names = list(result["cases"][0]["variants"])
    lines = [
        f"{result['device']}, {result['threads']} threads, {result['instruction_set']}; torch "
        f"{result['versions']['torch']}; {result['date']}, commit {result['commit']}",
        "",
        f"Consistency loss (mse) and gradient, {BATCH}x{CLASSES} logits at 1/{STRIDE} of the side. "
        "Time in ms; memory: peak beyond what is held before the call, in MB.",
        "",
        "| side | "
        + " | ".join(f"{name}, {unit}" for unit in ("ms", "MB") for name in names)
        + " |",
        "|---:|" + "---:|" * (2 * len(names)),
    ]
    for case in result["cases"]:
        variants = [case["variants"][name] for name in names]
        times = " | ".join(f"{1e3 * v['median_s']:.1f}" for v in variants)
        memory = " | ".join(f"{v['peak_extra_bytes'] / 1e6:.1f}" for v in variants)
        lines.append(f"| {case['side']} | {times} | {memory} |")
    return "\n".join([*lines, "", *breakdown.markdown(result["breakdown"])]) + "\n"


def plot(result: dict[str, object], path: Path) -> None:
    """Time and memory over the side of the image, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sides = [case["side"] for case in result["cases"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name in result["cases"][0]["variants"]:
        variants = [case["variants"][name] for case in result["cases"]]
        left.plot(sides, [1e3 * v["median_s"] for v in variants], "o-", label=name)
        right.plot(sides, [v["peak_extra_bytes"] / 1e6 for v in variants], "o-", label=name)
    for axes, title in ((left, "time, ms"), (right, "peak extra memory, MB")):
        axes.set(xscale="log", yscale="log", title=title, xlabel="side of the image, pixels")
        axes.set_xticks(sides, list(map(str, sides)))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.suptitle(
        f"Consistency loss and gradient, {BATCH} images, {CLASSES} classes, logits at 1/8"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES), metavar="N")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each size")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json", help="result file")
    options = parser.parse_args(arguments)
    result = run(options.sides, rounds=options.rounds, with_compile=not options.no_compile)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(result))
    plot(result, options.out.with_suffix(".png"))
    print(markdown(result))


if __name__ == "__main__":
    main()
