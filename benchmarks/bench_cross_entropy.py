"""Cross-entropy with ignored pixels, forward and backward, against F.cross_entropy."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmt
from benchmarks import harness, inputs, models
from benchmarks.bench_consistency import with_gradient
from benchmarks.harness import Case, Work
from benchmarks.shapes import HEADLINE, TINY, Shape
from fastmt import reference


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[2:] != labels.shape[1:]:
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    return F.cross_entropy(logits, labels, ignore_index=255)


def cases(which: str) -> list[Case]:
    """The comparisons of the set "tiny", "quick" or "full"."""
    shape, compiled = (TINY, False) if which == "tiny" else (HEADLINE, True)
    name, group = f"{shape} float32", "cross-entropy"
    return [
        Case(name, group, partial(_build, shape, 1), compiled),
        Case(
            f"{name} from 1/4", f"{group}, up-sampled inside", partial(_build, shape, 4), compiled
        ),
    ]


def _build(shape: Shape, stride: int, device: torch.device, compiled: bool) -> Work:
    logits = inputs.logits(shape.lowered(stride), device=device, seed=0).requires_grad_()
    labels = inputs.labels(shape, device=device, seed=1)
    functions = {
        "eager": eager,
        **harness.compiled(eager, compiled),
        harness.FUSED: fastmt.cross_entropy,
    }
    return Work(
        variants={n: partial(with_gradient, f, logits, labels) for n, f in functions.items()},
        expected=partial(expected_of, logits, labels),
        tolerance=harness.TOLERANCE[logits.dtype],
        bytes=models.cross_entropy(logits, labels),
        choice=fastmt.explain(fastmt.cross_entropy, logits, labels),
        leaves=(logits,),
    )


def expected_of(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Loss and gradient of the reference in float64, one image at a time to save memory."""
    valid = (labels != 255).sum()
    total, gradients = 0.0, []
    for image, label in zip(logits.detach().split(1), labels.split(1), strict=True):
        leaf = image.double().requires_grad_()
        mean = reference.cross_entropy(leaf, label, normalize="all")
        share = mean * label.numel() / valid
        share.backward()
        total += share.detach()
        gradients.append(leaf.grad.float())
    return [total, torch.cat(gradients)]


@harness.parametrize("variant", ["eager", harness.FUSED])
@harness.parametrize("case", cases("quick"), ids=lambda case: case.name)
def test_cross_entropy(benchmark, case: Case, variant: str) -> None:
    harness.benchmark_variant(benchmark, case, variant)
