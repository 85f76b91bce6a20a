"""What the CUDA C++ kernels take of a GPU: registers, shared memory, spills, warps that fit.

python -m benchmarks.cuda_resources [--out benchmarks/results/cuda-resources.json]

Registers and spills are what ptxas said when the library was built (fastmt/_build_info.json);
nothing runs. Shared memory and warps are those at 1/8 resolution, in tiles of 128 columns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmt import cpp_backend

RESULTS = Path(__file__).parent / "results"
HEADER = (
    "kernel",
    "classes",
    "GPU",
    "registers",
    "spilled bytes",
    "shared bytes",
    "warps of an SM",
)
TILE, PITCH, MAX_ROWS, QUANTITIES, PLACE = 128, 132, 32, 5, 7  # as in csrc/cuda
REACH = TILE // 8 + 2  # low-resolution columns of a tile
REGISTERS = 64 * 1024  # of a multiprocessor; a quarter of it for each of its schedulers
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}  # of a multiprocessor
RESERVED = 1024  # shared bytes that the driver takes for each block


def shared_bytes(classes: int, grids: int, reach: int, staged: bool, gradient: bool) -> int:
    """What a block of a kernel with a constant number of classes asks for, as in plan.cu.

    Grids of the same size; `staged` as in stage.h; `gradient`: columns of it are joined.
    """
    rows = gradient * (1 if staged else 2) * classes * PITCH
    sums_weights_and_place = (QUANTITIES + 1) * TILE + PLACE
    tables = grids * (3 * MAX_ROWS + 2 * TILE) + gradient * reach + 1
    column = 2 * pack(classes) + 12 if staged else 0
    return 4 * (pack(pack(rows + sums_weights_and_place) + tables) + grids * reach * column)


def pack(values: int) -> int:
    return -(-values // 4) * 4


def warps(registers: int, threads: int, shared: int, architecture: str) -> int | None:
    """Warps that a multiprocessor holds at once; None for a GPU that is not in the table."""
    if architecture not in SHARED:
        return None
    each = -(-registers // 8) * 8 * 32  # registers of a warp
    by_registers = 4 * (REGISTERS // 4 // each) // (threads // 32)
    by_shared = SHARED[architecture] // (shared + RESERVED)
    return min(by_registers, by_shared, 64 * 32 // threads) * (threads // 32)


def row_of(kernel: dict[str, Any]) -> dict[str, Any]:
    name, variant, architecture = (kernel[k] for k in ("kernel", "variant", "architecture"))
    fixed = variant.isdigit()
    grids = 2 if "consistency" in name else 1
    how = "powers" in name, "confidence" not in name
    shared = shared_bytes(int(variant), grids, REACH, *how) if fixed else None
    fitting = warps(kernel["registers"], TILE, shared, architecture) if shared else None
    values = (name, variant, architecture, kernel["registers"], kernel["spilled"], shared, fitting)
    return dict(zip(HEADER, values, strict=True))


def table() -> dict[str, Any]:
    """Compiler and rows of the library that is built; ValueError where there is none."""
    record = cpp_backend.build_info().get("cuda", {})
    if not record.get("built"):
        raise ValueError(f"no CUDA kernels here: {record.get('reason', 'no build record')}")
    rows = [row_of(kernel) for kernel in record["kernels"]]
    order = sorted(
        rows, key=lambda row: (row["kernel"], row["classes"], len(row["GPU"]), row["GPU"])
    )
    return {"compiler": record["compiler"], "rows": order}


def markdown(made: dict[str, Any]) -> str:
    lines = [
        "# What the CUDA C++ kernels take of a GPU",
        "",
        f"nvcc: {made['compiler']}. Written by `python -m benchmarks.cuda_resources`; no GPU ran.",
        "",
        f"| {' | '.join(HEADER)} |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in made["rows"]:
        cells = ["" if row[name] is None else str(row[name]) for name in HEADER]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "cuda-resources.json")
    out = parser.parse_args(arguments).out
    try:
        made = table()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    out.write_text(json.dumps(made, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
