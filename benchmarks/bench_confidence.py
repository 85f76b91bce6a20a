"""Softmax confidence: score and label of each pixel against softmax followed by max."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmt
from benchmarks import harness, inputs, models
from benchmarks.harness import Case, Work
from benchmarks.shapes import HEADLINE, TINY, Shape
from fastmt import reference


def eager(logits: Tensor) -> tuple[Tensor, Tensor]:
    score, label = logits.softmax(1, dtype=torch.float32).max(1)
    return score, label


def cases(which: str) -> list[Case]:
    """The comparisons of the set "tiny", "quick" or "full"."""
    shape, compiled = (TINY, False) if which == "tiny" else (HEADLINE, True)
    name, group = f"max_prob {shape} float32", "confidence"
    return [
        Case(name, group, partial(_build, shape, 1), compiled),
        Case(
            f"{name} from 1/8", f"{group}, up-sampled inside", partial(_build, shape, 8), compiled
        ),
    ]


def _build(shape: Shape, stride: int, device: torch.device, compiled: bool) -> Work:
    low, size = shape.lowered(stride), shape.spatial if stride > 1 else None
    logits = inputs.logits(low, device=device, seed=0, in_steps=stride > 1)
    slow = partial(at_size, size) if size else eager
    fused = partial(fastmt.softmax_confidence, size=size)
    functions = {"eager": slow, **harness.compiled(slow, compiled), harness.FUSED: fused}
    return Work(
        variants={name: partial(function, logits) for name, function in functions.items()},
        expected=partial(expected_of, logits, size),
        tolerance=harness.TOLERANCE[logits.dtype],
        bytes=models.softmax_confidence([logits], size),
        choice=fastmt.explain(fastmt.softmax_confidence, logits, size=size),
    )


def at_size(size: Sequence[int], logits: Tensor) -> tuple[Tensor, Tensor]:
    return eager(F.interpolate(logits, size, mode="bilinear"))


def expected_of(logits: Tensor, size: Sequence[int] | None) -> list[Tensor]:
    """Score and label of the reference in float64, one image at a time to save memory."""
    images = [reference.softmax_confidence(image.double(), size=size) for image in logits.split(1)]
    return [torch.cat(parts) for parts in zip(*images, strict=True)]


@harness.parametrize("variant", ["eager", harness.FUSED])
@harness.parametrize("case", cases("quick"), ids=lambda case: case.name)
def test_softmax_confidence(benchmark, case: Case, variant: str) -> None:
    harness.benchmark_variant(benchmark, case, variant)
