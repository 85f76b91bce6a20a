"""The Triton kernels as nodes of a graph that torch.compile traces."""

from __future__ import annotations

import pytest
import torch
from operands import random_logits

import fastmt
from fastmt import triton_backend

STUDENT, TEACHER = random_logits((2, 5, 6, 7), 1), random_logits((2, 5, 6, 7), 2)
LABELS = torch.arange(2 * 6 * 7).view(2, 6, 7) % 5
OPERATIONS = {
    "consistency_loss": lambda z: fastmt.consistency_loss(z, TEACHER, threshold=0.5, size=(9, 11)),
    "consistency_loss of volumes": lambda z: fastmt.consistency_loss(
        *(each.unflatten(2, (2, 3)) for each in (z, TEACHER)), threshold=0.5, size=(5, 4, 8)
    ),
    "cross_entropy": lambda z: fastmt.cross_entropy(z, LABELS),
    "softmax_confidence": lambda z: fastmt.softmax_confidence(z)[0],
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(kernels, monkeypatch):
    """No answer is remembered, as that of a device which was not asked before."""
    torch.compiler.reset()
    triton_backend._launch_obstacle.cache_clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_a_compiled_operation_is_the_launched_one_in_one_graph(operation):
    z = STUDENT.clone().requires_grad_()
    function = torch.compile(operation, backend="aot_eager", fullgraph=True)
    results = []
    for f in (function, operation):
        value = f(z)
        if value.requires_grad:
            value = torch.stack([value, *torch.autograd.grad(value, z)[0].flatten()])
        results.append(value)
    torch.testing.assert_close(*results)
