"""Compiles the Triton kernels ahead of time, with no GPU, and reports what became of them.

    python -m benchmarks.aot                                  # all of it, minutes
    python -m benchmarks.aot --targets sm_90 --classes 19     # renews these rows only

The entry points of fastmt.kernels run on meta tensors, and every launch becomes a compilation: what
is compiled is what such a call compiles on a GPU. Writes benchmarks/results/aot.md and aot.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.code_figures import figures
from fastmt import kernels
from fastmt.kernels import launch as launching
from fastmt.kernels.calls import KINDS, LOSSES
from fastmt.kernels.ema import COLUMNS as TABLE_COLUMNS
from fastmt.kernels.launch import forget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CLASSES = (19, 21, 81, 150)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RESULTS = Path(__file__).parent / "results"
THOROUGH = "sm_90"  # where every option is compiled; elsewhere the first of each
BATCH, LOW, HIGH = 8, 128, 1024
VOLUMES, SLICES = (2, 14, 24, 24, 24), 96  # logits, and what their depth becomes


class Launch(NamedTuple):
    """One launch of a call, and its compiled kernel."""

    kernel: str
    compiled: Any


class _AbsentDevice:
    """The driver of a device that is not there; it can be compiled for."""

    def __init__(self, target: GPUTarget, device: int) -> None:
        self.target, self.device = target, device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def registers_of(made: Any) -> tuple[int, int]:
    """As launch() asks of a driver: how many a thread takes, and whether some are in memory."""
    return itemgetter("registers", "stack")(figures(made))


@contextlib.contextmanager
def compiling(target: str) -> Iterator[list[Launch]]:
    """Every launch in this context is compiled for `target` and appended to the list."""
    launches: list[Launch] = []
    run, active, asked = triton.JITFunction.run, driver._active, launching.registers_of

    def compile_only(self, *args, grid, warmup, **kwargs):
        made = run(self, *args, grid=grid, warmup=True, **kwargs)
        if warmup:
            return made
        launches.append(Launch(self.__name__, made))

    forget()  # calls on meta tensors are prepared for whatever device is there
    driver.set_active(_AbsentDevice(TARGETS[target], list(TARGETS).index(target)))
    triton.JITFunction.run = compile_only
    launching.registers_of = registers_of
    try:
        yield launches
    finally:
        triton.JITFunction.run, driver._active, launching.registers_of = run, active, asked


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases(classes: int, dtype: torch.dtype, every: bool) -> Iterator[tuple[str, Callable]]:
    """(what is called, the call) for each operation and option, dense and up-sampled inside."""
    for name, side, size in (("dense", HIGH, None), ("cells", LOW, [HIGH, HIGH])):
        z = meta(BATCH, classes, side, side, dtype=dtype)
        labels = meta(BATCH, HIGH, HIGH, dtype=torch.uint8)
        for loss in LOSSES if every else LOSSES[:1]:
            options = [LOSSES.index(loss), 0, 0, 0, 0, 0]
            call = (z, [z], meta(1), None, None, options, 1.0, size, False, True)
            yield f"{name} consistency {loss}", lambda call=call: kernels.consistency_loss(*call)
        if every:
            call = (z, [z], 0.9, None, None, [0, 0, 0, 0, 0, 0], 1.0, size, False, True)
            label = f"{name} consistency mse, threshold a number"
            yield label, lambda call=call: kernels.consistency_loss(*call)
        for kind in KINDS if every else KINDS[:1]:
            call = ([z], KINDS.index(kind), 1.0, size, False)
            yield f"{name} confidence {kind}", lambda call=call: kernels.softmax_confidence(*call)
        for smoothing in (0.0, 0.1) if every else (0.0,):
            call = (z, labels, None, None, [255, 1], smoothing, False, True)
            label = f"{name} cross_entropy" + (" smoothed" if smoothing else "")
            yield label, lambda call=call: kernels.cross_entropy(*call)
        if every:
            call = (z, labels.long(), None, None, [255, 1], 0.0, False, True)
            label = f"{name} cross_entropy, int64 labels"
            yield label, lambda call=call: kernels.cross_entropy(*call)
    if every:
        z = meta(BATCH, classes, HIGH, HIGH, dtype=dtype).to(memory_format=torch.channels_last)
        call = (z, [z], meta(1), None, None, [0, 0, 0, 0, 0, 0], 1.0, None, False, True)
        yield "channels-last consistency mse", lambda call=call: kernels.consistency_loss(*call)


def common_cases() -> Iterator[tuple[str, Callable]]:
    """The calls that know nothing of classes."""
    table, starts = meta(300, TABLE_COLUMNS, dtype=torch.int64), meta(301, dtype=torch.int64)
    decays, draws = meta(1, dtype=torch.float64), meta(1, dtype=torch.int64)
    yield "ema_update_", lambda: kernels.ema_update_(table, starts, decays)
    yield "ema_update_ rounding", lambda: kernels.ema_update_(table, starts, decays, draws)
    for name, dtype in DTYPES.items():
        data = meta(BATCH, 19, HIGH, HIGH, dtype=dtype)
        yield f"scale_ {name}", lambda data=data: kernels.scale_(data, meta(), meta())
        z = meta(*VOLUMES, dtype=dtype).movedim(2, 1)
        yield f"resample_slices {name}", lambda z=z: kernels.resample_slices(z, SLICES, False)
    batch, classes, depth, *plane = VOLUMES
    given = (meta(batch, SLICES, classes, *plane), depth, False)
    yield "resample_slices_backward", lambda: kernels.resample_slices_backward(*given)


def measured(
    target: str,
    classes: Sequence[int],
    dtypes: Sequence[str],
    wanted: Callable[[str], bool] = lambda call: True,
) -> list[dict[str, Any]]:
    """One row for each kernel that the wanted calls launch, but those that only add up sums."""
    rows = []
    calls = [("any", "any", case) for case in common_cases()]
    calls += [
        (c, name, case)
        for c in classes
        for name in dtypes
        for case in cases(c, DTYPES[name], target == THOROUGH)
    ]
    with compiling(target) as launches:
        for c, name, (label, call) in calls:
            if not wanted(label):
                continue
            launches.clear()
            call()
            for kernel, compiled in launches:
                if not kernel.endswith("total_kernel"):
                    rows.append(
                        {
                            "target": target,
                            "call": label,
                            "classes": c,
                            "dtype": name,
                            "kernel": kernel,
                            **figures(compiled),
                        }
                    )
    return rows


def key_of(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in ("target", "call", "classes", "dtype", "kernel"))


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Old rows with those that were compiled anew in their place, in a fixed order."""
    rows = {key_of(row): row for row in (*old, *new)}
    return sorted(rows.values(), key=lambda row: tuple(map(str, key_of(row))))


COLUMNS = ("instructions", "registers", "stack", "shared", "warps", "load", "store")
FOOT = """\
## Accesses of less than 16 bytes

- The dense kernels take bfloat16 logits 8 bytes a thread, 4 pixels: a warp asks for 256 bytes in a
  row and the same sectors either way. With 8 pixels a thread takes more registers, and a GPU
  longer (benchmarks/gpu_choice).
- The dense confidence of many classes has one or two pixels for each thread to store, an 8-byte
  label and a 4-byte score each; neighbouring threads store neighbours, one instruction a block.
- The cells kernels read low-resolution logits, of which neighbouring output pixels share the same:
  few of their instructions are accesses, and wider ones would save no byte from memory: eight-fold,
  all logits together are 1/64 of what the dense kernels read.
- join_kernel gathers what a few strips left for a low-resolution pixel, 4 bytes each; ema_kernel
  keeps one layout in registers for tensors of every dtype: 16 bytes of float32, 8 of bfloat16,
  which most of its accesses are where it rounds.
- On gfx942 slices_fwd_kernel takes bfloat16 logits 8 bytes a thread, of which it has 256 there for
  1024 pixels: the planes of a volume have few more, and wider blocks would mostly be empty.
"""


def table(results: dict[str, Any]) -> str:
    lines = [
        "# What the compilers make of the Triton kernels",
        "",
        f"Made by `python -m benchmarks.aot` with Triton {results['triton']}, on no GPU. The calls",
        f"are of {BATCH} images of {HIGH}x{HIGH}, from {LOW}x{LOW} where they are up-sampled",
        f"inside (cells); {SLICES} slices are made of volumes of {VOLUMES}. Instructions are",
        "counted in the code, up to what serves a warp that has diverged; registers are",
        "of a thread; stack (what is spilled) and shared memory are bytes; load and store are the",
        "bytes of the access that moves most of the data.",
    ]
    for target in TARGETS:
        rows = [row for row in results["rows"] if row["target"] == target]
        if not rows:
            continue
        names = ("call", "classes", "dtype", "kernel", *COLUMNS)
        lines += ["", f"## {target}", "", "| " + " | ".join(names) + " |"]
        lines += ["|" + "---|" * 4 + "---:|" * len(COLUMNS)]
        lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    return "\n".join([*lines, "", FOOT])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--classes", nargs="+", type=int, default=list(CLASSES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--calls", default="", metavar="TEXT", help="calls that contain TEXT")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of aot.md and aot.json")
    options = parser.parse_args(arguments)
    file = options.out / "aot.json"
    results = json.loads(file.read_text()) if file.exists() else {"rows": []}
    if results.get("triton") != triton.__version__:
        results = {"triton": triton.__version__, "rows": []}
    for target in options.targets:
        new = measured(target, options.classes, options.dtypes, lambda call: options.calls in call)
        results["rows"] = merged(results["rows"], new)
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "aot.md").write_text(table(results))


if __name__ == "__main__":
    main()
