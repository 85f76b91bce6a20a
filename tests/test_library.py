"""The kernels under torch.library and torch.compile: nodes of a graph that have a gradient."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from graphs import compiled, graphs
from operands import DTYPES, random_logits

import fastmt
from fastmt import backends, cpp_backend, library

pytestmark = [
    pytest.mark.skipif(cpp_backend.missing() is not None, reason="the C++ kernels are not built"),
    pytest.mark.usefixtures("one_graph_and_no_other"),
]
SHAPE, LARGE = (2, 5, 6, 7), (13, 15)
STUDENT, TEACHER = random_logits(SHAPE, 1), random_logits(SHAPE, 2)
LABELS = torch.arange(2 * 13 * 15).view(2, *LARGE) % 5
LABELS[0, :3] = 255
OPERATIONS = {
    "consistency_loss": lambda z: fastmt.consistency_loss(z, TEACHER, threshold=0.5),
    "consistency_loss up-sampled": lambda z: fastmt.consistency_loss(
        z,
        [TEACHER, 2 * TEACHER],
        loss="kl",
        threshold=torch.linspace(0.3, 0.5, 5),
        pixel_weight=torch.linspace(0, 1, LABELS.numel()).view(LABELS.shape),
        valid=LABELS != 255,
        normalize="selected",
        size=LARGE,
    ),
    "cross_entropy": lambda z: fastmt.cross_entropy(z, LABELS[:, :6, :7]),
    "cross_entropy up-sampled": lambda z: fastmt.cross_entropy(
        z, LABELS, class_weight=torch.linspace(1, 2, 5), label_smoothing=0.1
    ),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


def samples():
    """Arguments for each operation, by the name of the operation."""
    half = torch.full(LABELS.shape, 0.5)
    threshold, many = torch.tensor([0.4]), torch.linspace(0.2, 0.6, 5)
    tables = torch.zeros(0, 9, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    options, scales = [0, 0, 0, 0, 0, 0], (torch.tensor(0.5), torch.tensor(3.0))
    for dtype in DTYPES:
        z, y = STUDENT.to(dtype), TEACHER.to(dtype)
        cropped = random_logits((2, 5, 8, 9), 3, dtype=dtype)[:, :, 1:-1, 1:-1]
        for gradient in (True, False):
            dense = ([y, cropped], threshold, None, None, options, 1.0, None, False, gradient)
            large = ([y], many, half, LABELS != 255, [1, 1, 1, 2, 1, 2], 0.5, LARGE, True, gradient)
            yield "consistency_loss", (cropped, *dense)
            yield "consistency_loss", (z, *large)
            small = LABELS[:, :6, :7].contiguous()
            yield "cross_entropy", (z, small, None, None, [255, 1], 0.0, False, gradient)
            yield "cross_entropy", (z, LABELS, half, many, [255, 2], 0.1, True, gradient)
        yield "softmax_confidence", ([y, cropped], 0, 1.0, None, False)
        yield "softmax_confidence", ([y], 1, 0.5, LARGE, True)
        yield "scale_", (z.clone(), *scales)
    decay = torch.tensor(0.9, dtype=torch.float64)
    yield "ema_update_", (*tables, decay)
    yield "ema_update_", (*tables, decay, torch.tensor(3))
    yield "ema_update_traced_", ([torch.zeros(3)], [torch.ones(3)], decay)


@pytest.mark.parametrize(
    "name, arguments",
    [pytest.param(*each, id=f"{each[0]}-{i}") for i, each in enumerate(samples())],
)
def test_the_library_checks_every_operation(name, arguments):
    torch.library.opcheck(getattr(torch.ops.fastmt, name).default, arguments)


@each_operation
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_loss_and_its_gradient_are_the_eager_ones(operation, dtype):
    z = STUDENT.to(dtype).requires_grad_()
    expected = operation(z)
    loss = compiled(operation)(z)
    assert torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(loss, z, torch.tensor(0.3), retain_graph=True)
    (again,) = torch.autograd.grad(loss, z, torch.tensor(0.3))
    (eager,) = torch.autograd.grad(expected, z, torch.tensor(0.3))
    assert gradient.any()
    assert gradient.dtype == dtype
    assert torch.equal(gradient, again)
    torch.testing.assert_close(gradient, eager, rtol=torch.finfo(dtype).eps, atol=0)
    assert graphs() == 1


@pytest.mark.parametrize("options", [{}, {"is_grads_batched": True}])
def test_nothing_to_divide_by_gives_a_gradient_of_zero_beside_a_nan_in_a_graph_too(options):
    teacher, z = TEACHER.clone(), STUDENT.clone().requires_grad_()
    teacher[0, 1, 2, 3] = torch.nan
    nothing = {"threshold": 1.1, "weight": "none", "normalize": "selected"}
    loss = compiled(lambda z: fastmt.consistency_loss(z, teacher, **nothing))(z)
    (gradient,) = torch.autograd.grad(loss, z, torch.ones(2 if options else ()), **options)
    assert loss == 0
    assert not gradient.any()


def test_inductor_keeps_the_kernels():
    def both(z):
        return OPERATIONS["consistency_loss"](2 * z) + OPERATIONS["cross_entropy"](z)

    z = STUDENT.clone().requires_grad_()
    loss, expected = compiled(both, "inductor")(z), both(z)
    (gradient,), (eager,) = torch.autograd.grad(loss, z), torch.autograd.grad(expected, z)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, eager)


@pytest.mark.parametrize("size", [None, LARGE])
def test_compiled_confidence_is_the_eager_one(size):
    def function(*members):
        return fastmt.softmax_confidence(members, kind="entropy", size=size)

    score, label = compiled(function)(TEACHER, STUDENT)
    expected = function(TEACHER, STUDENT)
    assert torch.equal(score, expected.score)
    assert torch.equal(label, expected.label)


def test_statistics_and_every_option_pass_through_a_graph():
    options = {"loss": "ce", "weight": "ratio", "threshold": 0.4, "strict": True}
    function = partial(fastmt.consistency_loss, return_stats=True, **options)
    loss, stats = compiled(function)(STUDENT, TEACHER)
    expected, expected_stats = function(STUDENT, TEACHER)
    assert torch.equal(loss, expected)
    assert tuple(stats) == tuple(expected_stats)
    module = fastmt.ConsistencyLoss.preset("uamt")
    assert torch.equal(compiled(module)(STUDENT, TEACHER), module(STUDENT, TEACHER))


def test_a_moving_threshold_and_weight_compile_once():
    function = compiled(
        lambda z, limit, weight: weight * fastmt.consistency_loss(z, TEACHER, threshold=limit)
    )
    for step in range(4):
        limit, weight = torch.tensor(0.3 + 0.1 * step), torch.tensor(float(step))
        expected = weight * fastmt.consistency_loss(STUDENT, TEACHER, threshold=limit)
        assert torch.equal(function(STUDENT, limit, weight), expected)
    assert graphs() == 1


@pytest.mark.parametrize("upsampled", [False, True])
def test_one_dynamic_graph_serves_every_size(upsampled):
    def objective(z, y, labels):
        size = labels.shape[1:] if upsampled else None
        consistency = fastmt.consistency_loss(z, y, threshold=0.4, size=size)
        score = fastmt.softmax_confidence(y, size=size).score
        return consistency + fastmt.cross_entropy(z, labels) + score.mean()

    function = compiled(objective, dynamic=True)
    for side in (6, 9, 12):
        z, y = random_logits((3, 5, side, side + 1), 1), random_logits((3, 5, side, side + 1), 2)
        labels = torch.arange(3 * 4 * side * (side + 2)).view(3, 2 * side, 2 * side + 4) % 5
        assert torch.equal(function(z, y, labels), objective(z, y, labels))
    assert graphs() == 1


def test_a_compiled_function_follows_the_backend_that_is_asked_for():
    z = STUDENT.double()  # only the reference serves it
    function = torch.compile(OPERATIONS["consistency_loss"], backend="aot_eager")
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot serve"):
        function(z)
    torch.compiler.reset()
    with fastmt.backend("eager"):
        expected = OPERATIONS["consistency_loss"](STUDENT)
        assert torch.equal(function(STUDENT), expected)
    with torch._dynamo.config.patch(error_on_recompile=False):
        assert torch.equal(function(STUDENT), OPERATIONS["consistency_loss"](STUDENT))


def test_a_label_out_of_range_is_an_error_of_the_compiled_graph_too():
    function = compiled(fastmt.cross_entropy)
    function(STUDENT, LABELS)
    with pytest.raises(RuntimeError, match="labels: got a label outside 0..4 that is not 255"):
        function(STUDENT, torch.where(LABELS == 3, 5, LABELS))


@each_operation
def test_a_second_derivative_of_a_compiled_loss_is_a_clear_error(operation):
    z = STUDENT.clone().requires_grad_()
    loss = compiled(operation)(z)
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    if not gradient.requires_grad:
        pytest.skip(f"torch {torch.__version__} gives compiled gradients no graph")
    with pytest.raises(RuntimeError, match="double backward"):
        (loss + gradient.square().sum()).backward()


@each_operation
def test_compiled_autocast_leaves_logits_as_they_come_and_computes_in_float32(operation):
    network = torch.nn.Conv2d(3, 5, 1)

    def objective(images):
        with torch.autocast("cpu", torch.bfloat16):
            z = network(images)
            return z, operation(z)

    images = torch.linspace(0, 1, 2 * 3 * 6 * 7).view(2, 3, 6, 7)
    z, loss = compiled(objective)(images)
    assert z.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert torch.equal(loss, operation(z))
    loss.backward()
    assert network.weight.grad.any()


def test_importing_fastmt_does_not_import_the_compiler():
    command = "import sys, fastmt; assert not {'torch._dynamo', 'torch._inductor'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", command], check=True)


@pytest.mark.parametrize("name", library.SCHEMAS)
def test_kernels_in_python_have_the_schema_of_those_in_cpp(name):
    schema = getattr(torch.ops.fastmt, name).default._schema
    assert str(schema) == f"fastmt::{name}{library.SCHEMAS[name]}"


@each_operation
def test_kernels_in_python_become_nodes_of_a_graph(operation, monkeypatch):
    calls = []

    class Python:
        """Kernels that are no nodes themselves, as the Triton ones."""

        def __getattr__(self, name):
            def kernel(*arguments):
                calls.append(name)
                return getattr(torch.ops.fastmt, name)(*arguments)

            return kernel

    nodes = library.define("fastmt_in_python", Python())
    try:
        monkeypatch.setattr(backends, "operations", lambda backend: torch.ops.fastmt_in_python)
        z = STUDENT.clone().requires_grad_()
        loss = compiled(operation)(z)
        (gradient,) = torch.autograd.grad(loss, z)
    finally:
        nodes._destroy()
    monkeypatch.undo()
    expected = operation(z)
    (eager,) = torch.autograd.grad(expected, z)
    assert calls in (["consistency_loss"], ["cross_entropy"])
    assert torch.equal(loss, expected)
    torch.testing.assert_close(gradient, eager)
