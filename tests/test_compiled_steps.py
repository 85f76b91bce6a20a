"""Training steps under torch.compile: the kernels and the averages are nodes of their graphs."""

from __future__ import annotations

import itertools

import pytest
import torch
from graphs import compiled, graphs
from operands import random_logits
from torch.optim import sgd

import fastmt
from fastmt import cpp_backend

pytestmark = [
    pytest.mark.skipif(cpp_backend.missing() is not None, reason="the C++ kernels are not built"),
    pytest.mark.usefixtures("one_graph_and_no_other"),
]
LARGE = (13, 15)
LABELS = torch.arange(2 * 13 * 15).view(2, *LARGE) % 5
LABELS[0, :3] = 255


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
