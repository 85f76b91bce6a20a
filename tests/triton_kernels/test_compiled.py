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


def nodes():
    """Arguments for each node of a graph, dense and up-sampled."""
    half, many = torch.full(LABELS.shape, 0.5), torch.linspace(0.2, 0.6, 5)
    low, options, size = STUDENT[:, :, :3, :4], [1, 1, 1, 2, 1, 2], list(LABELS.shape[1:])
    dense = ([TEACHER], torch.tensor([0.4]), None, None, [0] * 6, 1.0, None, False, True)
    cells = ([TEACHER, low], many, half, LABELS != 1, options, 0.5, size, True, True)
    yield "consistency_loss", (STUDENT, *dense)
    yield "consistency_loss", (low, *cells)
    yield "cross_entropy", (STUDENT, LABELS, None, None, [255, 1], 0.0, False, True)
    yield "cross_entropy", (low, LABELS.to(torch.uint8), half, many, [1, 2], 0.1, True, True)
    yield "softmax_confidence", ([STUDENT, TEACHER], 0, 1.0, None, False)
    yield "softmax_confidence", ([low], 1, 0.5, size, True)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [pytest.param(*each, id=f"{each[0]}-{i}") for i, each in enumerate(nodes())],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_library_checks_every_node(name, arguments, dtype):
    def cast(argument):
        if isinstance(argument, list) and isinstance(argument[0], torch.Tensor):
            return [logits.to(dtype) for logits in argument]
        return argument

    first, *others = map(cast, arguments)
    first = first if isinstance(first, list) else first.to(dtype)
    torch.library.opcheck(getattr(triton_backend.nodes(), name).default, (first, *others))


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
