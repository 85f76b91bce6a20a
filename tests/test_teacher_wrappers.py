"""Students and optimisers as other libraries hand them over."""

from __future__ import annotations

import functools
import threading
import weakref

import pytest
import torch
from followed import Net, advance, assert_same
from torch import nn

from fastmt import EMATeacher


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Net()


def compiled(forward):
    return torch.compile(forward, backend="eager")


def in_autocast(forward):
    def call(x):
        with torch.autocast("cpu"):
            return forward(x)

    return call


@pytest.mark.parametrize("remake", [compiled, in_autocast])
@pytest.mark.parametrize("name", ["", "first"])
def test_a_forward_that_would_run_the_students_weights_in_a_copy_is_refused(student, remake, name):
    module = student.get_submodule(name)
    module.forward = remake(module.forward)
    with pytest.raises(TypeError, match=f"^student: the forward of '{name or 'Net'}' .*compile()"):
        EMATeacher(student)


def call_itself(net: Net) -> None:
    net.project = lambda x: net.first(x)


def compile_a_method(net: Net) -> None:
    net.project = compiled(net.forward)


def hook(net: Net) -> None:
    net.norm.register_forward_hook(lambda module, args, output: net.last(output))


def hook_before(net: Net) -> None:
    net.norm.register_forward_pre_hook(lambda module, args: (net.last(args[0]),))


def hold_in_a_list(net: Net) -> None:
    net.paths = {"main": [lambda x: net.first(x)]}


def hold_in_a_partial(net: Net) -> None:
    net.project = functools.partial(lambda x, scale: net.first(scale * x), scale=2)


def refer_weakly(net: Net) -> None:
    net.norm.whole = weakref.ref(net)


def refer_weakly_in_a_function(net: Net) -> None:
    whole = weakref.ref(net)
    net.project = lambda x: whole().first(x)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (call_itself, "project of 'Net' is a function"),
        (compile_a_method, "project of 'Net' is a function"),
        (hook, "forward hook of 'norm' is a function"),
        (hook_before, "forward hook of 'norm' is a function"),
        (hold_in_a_list, "paths of 'Net' holds a function"),
        (hold_in_a_partial, "project of 'Net' holds a function"),
        (refer_weakly, "whole of 'norm' is a weak reference"),
        (refer_weakly_in_a_function, "project of 'Net' is a function"),
    ],
)
def test_a_function_that_would_run_the_students_weights_in_a_copy_is_refused(
    student, change, named
):
    change(student)
    with pytest.raises(TypeError, match=f"^student: the {named} that refers to the student"):
        EMATeacher(student)


def test_what_holds_functions_is_taken_where_these_refer_to_no_part_of_the_student(student):
    student.last.paths = [{"main": nn.functional.relu}, len, functools.partial(student.first)]
    student.last.paths.append(student.last.paths)
    student.norm.other = weakref.ref(Net().first), weakref.ref(student.first.weight)
    student.first.register_full_backward_hook(lambda *_: student.norm)  # no teacher comes to it
    teacher = EMATeacher(student)
    assert teacher.module.last.paths[2].func is teacher.module.first


def test_hooks_that_a_copy_takes_with_it_run_the_teachers_weights(student):
    seen = []
    student.norm.register_forward_hook(lambda module, args, output: seen.append(module))
    student.norm.register_forward_hook((lambda self, *_: self.last.bias).__get__(student))
    teacher = EMATeacher(student)
    advance(student, 1)
    expected = nn.functional.linear(teacher.module.last.bias, teacher.module.tied)
    assert torch.equal(teacher(torch.ones(2, 3)), expected)
    assert seen == [teacher.module.norm]


def test_a_forward_that_a_copy_takes_with_it_runs_the_teachers_weights(student):
    student.forward = (lambda self, x: 2 * Net.forward(self, x)).__get__(student)
    student.norm.forward = nn.functional.relu  # refers to no module
    teacher = EMATeacher(student, 0.5, warmup=None)
    advance(student, 1)
    teacher.update()
    plain = Net()
    plain.load_state_dict(teacher.state_dict())
    plain.norm.forward = nn.functional.relu
    x = torch.randn(2, 3)
    assert torch.equal(teacher(x), 2 * plain(x))


def test_a_student_with_what_cannot_be_copied_is_told_so(student):
    student.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"^student: Net cannot .*lock.*; make .* __deepcopy__\(\)"):
        EMATeacher(student)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize(("name", "named"), [("", "RecursiveScriptModule"), ("0.", "0")])
def test_a_scripted_student_is_told_to_be_followed_by_what_was_scripted(name, named):
    network = nn.Sequential(nn.Linear(3, 2))
    scripted = torch.jit.script(network)
    student = nn.Sequential(scripted) if name else scripted
    with pytest.raises(TypeError, match=f"^student: '{named}' is scripted.* whose parameters"):
        EMATeacher(student)
    teacher = EMATeacher(network, 0.0, warmup=None)
    with torch.no_grad():
        next(scripted.parameters()).fill_(3)
    teacher.update()
    assert (teacher.module[0].weight == 3).all()


def test_a_student_that_holds_its_own_teacher_is_told_so(student):
    student.teacher = EMATeacher(student)
    with pytest.raises(ValueError, match="^student: it holds its own teacher.* of the part"):
        student.teacher.update()
    student.teacher = EMATeacher(student.first)
    student.teacher.update()


class OfFabric(nn.Module):
    """As Lightning Fabric wraps a network: its state dict is the network's own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._forward_module = network

    def state_dict(self, *args, **kwargs):
        return self._forward_module.state_dict(*args, **kwargs)


def test_the_teacher_of_a_network_in_fabric_loads_what_it_saves(student):
    wrapped = OfFabric(nn.DataParallel(student))
    teacher, other = EMATeacher(wrapped), EMATeacher(OfFabric(Net()))
    advance(student, 1)
    teacher.update()
    other.load_state_dict(teacher.state_dict())
    assert_same(other.module, student)


class OfAccelerate(torch.optim.Optimizer):
    """As accelerate wraps an optimiser: it has no state of its own, and steps where it is due."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.is_due = optimizer, True

    def step(self) -> None:
        if self.is_due:
            self.optimizer.step()


def test_a_teacher_attached_to_an_optimiser_in_accelerate_updates_where_that_steps(student):
    optimizer = OfAccelerate(torch.optim.SGD(student.parameters(), lr=0.1))
    teacher = EMATeacher(student)
    teacher.attach(optimizer)
    for optimizer.is_due in (False, True, False, True):
        optimizer.step()
    assert teacher.updates == 2
