"""The report: every comparison in one process, as JSON and as a Markdown table next to it.

python -m benchmarks.report [--cases quick|full|ema] [--only TEXT] [--out FILE.json]

The set "ema" is the full one of the moving average alone. The results are written after each case,
and a case that fails has its reason there: GPUs are lent for minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from benchmarks import (
    bench_confidence,
    bench_consistency,
    bench_cross_entropy,
    bench_ema,
    bench_trainer,
    harness,
    machine,
    stopwatch,
)
from benchmarks.harness import duration

RESULTS = Path(__file__).parent / "results"
MODULES = (bench_consistency, bench_confidence, bench_cross_entropy, bench_ema)


def run(
    which: str,
    device: torch.device,
    *,
    only: str = "",
    with_compile: bool = True,
    rounds: int = 15,
    save: Callable[[dict], object] = lambda result: None,
) -> dict[str, object]:
    """Measure the cases of a set ("quick", "full", "ema", "tiny") whose name contains `only`."""
    tiny = which == "tiny"
    speed = {"sample_seconds": 0.001, "copy_bytes": 1 << 20} if tiny else {}
    result: dict[str, object] = {"cases_set": which, "rounds": rounds, **machine.record(device)}
    result |= {"cases": [], "left_out": {}}
    modules = (bench_ema,) if which == "ema" else MODULES
    for case in (case for module in modules for case in module.cases(which)):
        name = f"{case.group}: {case.name}"
        if only in name:
            print(name, file=sys.stderr, flush=True)
            try:
                result["cases"].append(
                    harness.measure(case, device, with_compile=with_compile, rounds=rounds, **speed)
                )
            except Exception as error:
                result["left_out"][name] = harness.told(error)
                print(f"FAILED {result['left_out'][name]}", file=sys.stderr, flush=True)
            save(result)
    setting = bench_trainer.TINY_STEP if tiny else bench_trainer.STEP
    if which != "ema" and only in f"trainer: {setting}":
        print(f"trainer: {setting}", file=sys.stderr, flush=True)
        result["trainer"] = bench_trainer.measure(setting, device, steps=rounds)
    return result


def markdown(result: dict[str, object]) -> str:
    """The result as tables: one for each group of cases, one for the trainer's step."""
    lines = [
        f"{result['device']}, {result['threads']} threads, {result['instruction_set']}; "
        f"torch {result['versions']['torch']}; {result['date']}, commit {result['commit']}"
        + (" with uncommitted changes" if result["uncommitted_changes"] else ""),
        "",
        f"Medians of {result['rounds']} interleaved rounds, each variant checked against the "
        "reference first. A ratio says how many times as long as the fused call a variant takes. "
        "GB/s: bytes that have to move (benchmarks/models.py) by time. Of copy: as a part of a "
        "large copy's in the same rounds; above 100% where tensors stay in a cache, or are updated "
        "in place, while a copy also fetches the lines that it overwrites. Memory: peak beyond "
        "what is held before the call, the gradient included.",
    ]
    for group, cases in groupby(result["cases"], key=lambda case: case["group"]):
        lines += ["", f"## {group.capitalize() if group.islower() else group}", ""]
        measured = list(cases)
        lines += _table(measured)
        lines += _overheads(measured)
        lines += _quicker(measured) if group == bench_ema.GROUP else []
    if "trainer" in result:
        lines += ["", "## Trainer", "", *_trainer_table(result["trainer"])]
    left_out = [f"- {name}: {why}" for name, why in _left_out(result).items()]
    lines += ["", "Left out:", "", *left_out] if left_out else []
    return "\n".join(lines) + "\n"


def _left_out(result: dict[str, object]) -> dict[str, str]:
    """Cases, and variants of others, with the reason why they were not timed."""
    found = dict(result["left_out"])
    for case in result["cases"]:
        found |= {f"{case['name']}, {name}": why for name, why in case["left_out"].items()}
    return found


def _quicker(cases: list[dict]) -> list[str]:
    """What of others takes less time than ours, if anything does."""
    lines = []
    for case in cases:
        for ours, others in bench_ema.quicker(case).items():
            what = "; ".join(f"{name}, {part:.2f} of it" for name, part in others.items())
            lines.append(f"- {case['name']}, `{ours}`: {what}")
    if not lines:
        return ["", "Nothing takes less time than `ema_update_` or `EMATeacher.update`."]
    return ["", "What takes less time than ours:", "", *lines]


def _table(cases: list[dict]) -> list[str]:
    others = list(dict.fromkeys(name for case in cases for name in case["ratios"]))
    header = ["case", "runs as", "fused"]
    header += [f"{name} / fused" for name in others]
    header += ["GB/s", "of copy", f"memory: {' / '.join([harness.FUSED, *others])}"]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for case in cases:
        variants = case["variants"]
        memory = [_megabytes(variants.get(name)) for name in (harness.FUSED, *others)]
        rows.append(
            [
                case["name"],
                case["backend"],
                duration(variants[harness.FUSED]["median_s"]),
                *(f"{case['ratios'][n]:.2f}" if n in case["ratios"] else "-" for n in others),
                f"{case['fused_gb_per_s']:.3g}",
                f"{case['fraction_of_copy']:.0%}",
                " / ".join(memory) + " MB",
            ]
        )
    return [f"| {' | '.join(row)} |" for row in rows]


def _overheads(cases: list[dict]) -> list[str]:
    beyond = {case["name"]: bench_ema.overhead(case) for case in cases}
    lines = [
        f"- {name}: {duration(over[1])} ({duration(over[0])} to {duration(over[2])})"
        for name, over in beyond.items()
        if over is not None
    ]
    if not lines:
        return []
    what = "matching, checks, decay, and the buffers of modules; median and quartiles of the rounds"
    return ["", f"`EMATeacher.update()` beyond the kernel ({what}):", "", *lines]


def _trainer_table(trainer: dict) -> list[str]:
    steps = trainer["steps"]
    parts = list(next(iter(steps.values()))["parts_s"])
    own = [name for name in parts if name not in stopwatch.NETWORKS]
    lines = [
        f"{trainer['name']}. The trainer's own work is all but the networks and the optimiser.",
        "",
        f"| part | {' | '.join(steps)} |",
        "|---|" + "---:|" * len(steps),
    ]
    for name in (*stopwatch.NETWORKS, *own):
        lines.append(_row(name, (duration(step["parts_s"][name]) for step in steps.values())))
    lines.append(_row("step", (duration(step["step_s"]) for step in steps.values())))
    shares = (f"{duration(s['own_s'])} ({s['own_share']:.1%})" for s in steps.values())
    return [*lines, _row("own work", shares)]


def _row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _megabytes(variant: dict | None) -> str:
    peak = None if variant is None else variant["peak_extra_bytes"]
    return "-" if peak is None else f"{peak / 1e6:.0f}"


def write(result: dict[str, object], out: Path) -> str:
    """The result and, beside it, its tables, which are returned."""
    text = markdown(result)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    out.with_suffix(".md").write_text(text)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", choices=("quick", "full", "ema"), default="quick")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each case")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="result file; default: by device and set")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and (reason := machine.no_gpu()):
        parser.error(reason)
    if options.threads:
        torch.set_num_threads(options.threads)
    which = "tiny" if options.tiny else options.cases
    out = options.out or RESULTS / f"{options.device}-{which}.json"
    result = run(
        which,
        torch.device(options.device),
        only=options.only,
        with_compile=not options.no_compile,
        rounds=options.rounds,
        save=partial(write, out=out),
    )
    print(write(result, out))
    return int(bool(_left_out(result)))


if __name__ == "__main__":
    sys.exit(main())
