"""The kernels under torch.library and torch.compile: nodes of a graph that have a gradient."""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch
from operands import DTYPES, random_logits
from torch._dynamo.utils import counters
from torch.optim import sgd

import fastmt
from fastmt import backends, cpp_backend, library

pytestmark = pytest.mark.skipif(
    cpp_backend.missing() is not None, reason="the C++ kernels are not built"
)
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


@pytest.fixture(autouse=True)
def one_graph_and_no_other():
    """Compiled anew in each test; a second compilation of the same code is an error."""
    torch.compiler.reset()
    counters.clear()
    with (
        fastmt.backend("cpp", strict=True),
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        yield
    torch.compiler.reset()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def samples():
    """Arguments for each operation, by the name of the operation."""
    half = torch.full(LABELS.shape, 0.5)
    threshold, many = torch.tensor([0.4]), torch.linspace(0.2, 0.6, 5)
    tables = torch.zeros(0, 5, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
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


def graphs():
    """How many graphs dynamo has captured since the last reset."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


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


def test_one_dynamic_graph_serves_every_size():
    def objective(z, y, labels):
        consistency = fastmt.consistency_loss(z, y, threshold=0.4)
        return consistency + fastmt.cross_entropy(z, labels)

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


class Training:
    """A student with its teacher and momentum, and a step in which everything moves."""

    def __init__(self):
        torch.manual_seed(0)
        self.student = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.Conv2d(8, 5, 1)
        )
        self.teacher = fastmt.EMATeacher(self.student, 0.9)
        self.parameters = list(self.student.parameters())
        self.momentum = [torch.zeros_like(p) for p in self.parameters]
        self.threshold, self.weight = torch.zeros(()), torch.zeros(())

    def objective(self, source, labels, target, teacher):
        logits = self.student(torch.cat([source, target]))
        source_logits, target_logits = logits.split([len(source), len(target)])
        consistency, stats = fastmt.consistency_loss(
            target_logits,
            teacher,
            threshold=self.threshold,
            size=target.shape[2:],
            return_stats=True,
        )
        supervised = fastmt.cross_entropy(source_logits, labels)
        return supervised + self.weight * consistency, stats.selected

    def optimise(self, gradients):
        with torch.no_grad():
            sgd.sgd(
                self.parameters,
                gradients,
                self.momentum,
                foreach=True,
                weight_decay=1e-3,
                momentum=0.9,
                lr=0.1,
                dampening=0,
                nesterov=True,
                maximize=False,
            )

    def step(self, *batch):
        loss, selected = self.objective(*batch)
        self.optimise(torch.autograd.grad(loss, self.parameters))
        return loss.detach(), selected

    def run(self, step, update):
        """What four steps of a moving threshold and weight report, and the parameters at last."""
        source, target = torch.rand((2, 2, 3, *LARGE), generator=torch.Generator().manual_seed(0))
        reports = []
        for t in range(4):
            self.threshold.fill_(0.2 + 0.01 * t)
            self.weight.fill_(t)
            reports.extend(step(source, LABELS, target, self.teacher(target)))
            update()
        return [*reports, *self.parameters, *self.teacher.parameters()]


def assert_trained_alike(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"),
    reason="this torch cannot trace torch.autograd.grad",
)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_whole_step_is_one_graph_that_no_schedule_recompiles(backend):
    eager, training = Training(), Training()
    expected = eager.run(eager.step, eager.teacher.update)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        step = compiled(training.step, backend)
        actual = training.run(step, training.teacher.update)
        assert graphs() == 1
    assert_trained_alike(actual, expected)


def test_forward_and_optimiser_compile_apart_as_on_an_older_torch():
    eager, training = Training(), Training()
    expected = eager.run(eager.step, eager.teacher.update)
    objective, optimise = compiled(training.objective), compiled(training.optimise)

    def step(*batch):
        loss, selected = objective(*batch)
        optimise(torch.autograd.grad(loss, training.parameters))
        return loss.detach(), selected

    assert_trained_alike(training.run(step, training.teacher.update), expected)
    assert graphs() == 2


def test_the_teacher_is_averaged_inside_a_compiled_function():
    eager, training = Training(), Training()
    expected = eager.run(eager.step, eager.teacher.update)

    def update_and_count(counter):
        training.teacher.update()
        return counter + 1

    update = torch.compile(update_and_count, backend="aot_eager")
    counter = itertools.count()
    actual = training.run(training.step, lambda: update(torch.tensor(next(counter))))
    assert_trained_alike(actual, expected)
    assert training.teacher.updates == 4


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_average_of_many_tensors_is_a_node_of_the_graph(backend):
    student = [random_logits((7, n), n) for n in range(1, 4)] + [torch.arange(3)]
    traced, eager = ([torch.zeros_like(value) for value in student] for _ in range(2))

    def update(decay):
        fastmt.ema_update_(traced, [value + 1 for value in student], decay)
        return traced[0].sum()

    function = compiled(update, backend)
    for decay in torch.tensor([0.5, 0.9, 0.99]):
        total = function(decay)
        fastmt.ema_update_(eager, [value + 1 for value in student], decay)
        assert all(map(torch.equal, traced, eager))
        torch.testing.assert_close(total, eager[0].sum())
    assert graphs() == 1


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
