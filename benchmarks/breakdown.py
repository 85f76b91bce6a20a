"""Where the time of an up-sampled consistency loss goes, and how far that is from the arithmetic.

The parts are differences of calls, on one thread: the teacher alone (its confidence), the loss
without gradient, the loss with it. The floor counts the vector instructions that the arithmetic
needs for each class and pixel of csrc/cpu/cells_kernel.h, and takes them at the rate at which this
core runs the fused multiply-adds of a matrix product.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

import fastmt
from benchmarks import harness, inputs
from benchmarks.shapes import Shape
from fastmt import cpp_backend

SHAPE, STRIDE = Shape(2, 19, (512, 512)), 8
LANES = {"avx512": 16, "avx2": 8, "baseline": 4}  # floats in a vector
EXP = 15  # vector instructions of one exp

# Vector instructions for each class of a pixel, where a cell has STRIDE x STRIDE pixels. A cell
# starts with four exps, each of its rows with four products, each pixel with one.
INSTRUCTIONS = {
    "exponentials": 2 * (1 + 4 / STRIDE + 4 * EXP / STRIDE**2),  # of both networks
    "interpolation": 2 * (16 + 12) / STRIDE**2,  # exponents of the four exps, and their range
    "softmax sums and score": 3,
    "loss": 4,
    "gradient": 5,
    "gradient into the cell's corners": 2.5 + 5 / STRIDE,
    "weight and sums of a pixel": 23 / SHAPE.classes,  # a division counts as one
}


def measure(*, rounds: int) -> dict[str, object]:
    """Seconds of the parts, seconds of the floor, and the rate behind it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(rounds)
    finally:
        torch.set_num_threads(threads)


def _measure(rounds: int) -> dict[str, object]:
    device = torch.device("cpu")
    low = SHAPE.lowered(STRIDE)
    student = inputs.logits(low, device=device, seed=0).requires_grad_()
    teacher = inputs.logits(low, device=device, seed=1)
    loss = partial(fastmt.consistency_loss, threshold=0.7, size=SHAPE.spatial)
    left, right = torch.randn(2, 1024, 1024)
    runs = {
        "teacher": partial(fastmt.softmax_confidence, teacher, size=SHAPE.spatial),
        "without gradient": partial(loss, student.detach(), teacher),
        "with gradient": partial(_gradient, loss, student, teacher),
        "matrix product": partial(torch.mm, left, right),
    }
    seconds = harness.interleave(runs, device, rounds=rounds, sample_seconds=0.02)
    median = {name: statistics.median(samples) for name, samples in seconds.items()}
    lanes = LANES[cpp_backend.instruction_set()]
    rate = 1024**3 / lanes / median.pop("matrix product")  # vector instructions a second
    count = SHAPE.pixels * SHAPE.classes / lanes * sum(INSTRUCTIONS.values())
    return {
        "shape": str(SHAPE),
        "seconds": median,
        "instructions": INSTRUCTIONS,
        "vector_instructions_per_s": rate,
        "floor_s": count / rate,
        "of_floor": median["with gradient"] / (count / rate),
    }


def _gradient(loss: Callable, student: torch.Tensor, teacher: torch.Tensor) -> None:
    student.grad = None
    loss(student, teacher).backward()


def markdown(result: dict[str, object]) -> list[str]:
    """The parts as a table."""
    seconds, total = result["seconds"], sum(result["instructions"].values())
    lines = [
        f"One thread, {result['shape']} from 1/{STRIDE}: teacher's confidence alone "
        f"{1e3 * seconds['teacher']:.2f} ms, loss without gradient "
        f"{1e3 * seconds['without gradient']:.2f} ms, with gradient "
        f"{1e3 * seconds['with gradient']:.2f} ms; {result['of_floor']:.2f} times the "
        f"{1e3 * result['floor_s']:.2f} ms of the arithmetic alone, at the "
        f"{result['vector_instructions_per_s'] / 1e9:.2f} G vector instructions a second of a "
        "matrix product.",
        "",
        "| arithmetic | vector instructions a class and pixel | share |",
        "|---|---:|---:|",
    ]
    for name, count in result["instructions"].items():
        lines.append(f"| {name} | {count:.1f} | {count / total:.0%} |")
    return lines


def main() -> None:
    start = time.perf_counter()
    print("\n".join(markdown(measure(rounds=15))), f"\n\n{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
