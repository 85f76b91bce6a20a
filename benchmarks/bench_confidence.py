"""Softmax confidence: score and label of each pixel against softmax followed by max."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import fastmt
from benchmarks import harness, inputs, models
from benchmarks.harness import Case, Work
from benchmarks.shapes import HEADLINE, TINY, Shape
from fastmt import reference


def eager(logits: Tensor) -> tuple[Tensor, Tensor]:
    score, label = logits.softmax(1).max(1)
    return score, label


def cases(which: str) -> list[Case]:
    """The comparisons of the set "tiny", "quick" or "full"."""
    shape = TINY if which == "tiny" else HEADLINE
    build = partial(_build, shape)
    return [Case(f"max_prob {shape} float32", "confidence", build, compiled=which != "tiny")]


def _build(shape: Shape, device: torch.device, compiled: bool) -> Work:
    logits = inputs.logits(shape, device=device, seed=0)
    functions = {
        "eager": eager,
        **harness.compiled(eager, compiled),
        harness.FUSED: fastmt.softmax_confidence,
    }
    return Work(
        variants={name: partial(function, logits) for name, function in functions.items()},
        expected=partial(_expected, logits),
        tolerance=harness.TOLERANCE[logits.dtype],
        bytes=models.softmax_confidence([logits]),
        choice=fastmt.explain(fastmt.softmax_confidence, logits),
    )


def _expected(logits: Tensor) -> list[Tensor]:
    """Score and label of the reference in float64, one image at a time to save memory."""
    images = [reference.softmax_confidence(image.double()) for image in logits.split(1)]
    return [torch.cat(parts) for parts in zip(*images, strict=True)]


@pytest.mark.parametrize("variant", ["eager", harness.FUSED])
@pytest.mark.parametrize("case", cases("quick"), ids=lambda case: case.name)
def test_softmax_confidence(benchmark, case: Case, variant: str) -> None:
    harness.benchmark_variant(benchmark, case, variant)
