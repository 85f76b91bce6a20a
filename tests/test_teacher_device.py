"""A teacher on another device than its student's: the CPU stands for a GPU, meta for the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from fastmt import EMATeacher


class Marked(nn.Parameter):
    """A subclass as libraries make them, to tell some parameters from others."""


class Everything(nn.Module):
    """Tied, frozen, integer and subclassed parameters, odd layouts, derived weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.recurrent = nn.LSTM(4, 4, num_layers=2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.derived = parametrizations.weight_norm(nn.Linear(4, 4))
        self.first, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.marked = Marked(torch.randn(4))
        self.transposed = nn.Parameter(torch.randn(3, 4).t())
        self.codes = nn.Parameter(torch.arange(4), requires_grad=False)
        self.register_buffer("temporary", torch.randn(4), persistent=False)
        self.register_buffer("expanded", torch.randn(4, 1).expand(4, 3))
        self.register_buffer("part", torch.randn(8)[2:6])
        self.register_buffer("again", self.temporary)


class Made(TorchDispatchMode):
    """The memory on the CPU that operations have made or written."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_cpu:
            self.storages.add(made.untyped_storage().data_ptr())
        return made


def tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    named = (network.named_parameters, network.named_buffers)
    return {name: t for entries in named for name, t in entries(remove_duplicate=False)}


def test_a_teacher_elsewhere_takes_no_memory_of_the_students_device_while_it_is_made():
    student = Everything()
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors(student).values()}
    with Made() as made:
        teacher = EMATeacher(student, device="meta")
    assert all(tensor.is_meta for tensor in tensors(teacher.module).values())
    assert made.storages <= own


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_teacher_elsewhere_is_the_one_that_is_made_here_and_moved(device, dtype):
    student = Everything()
    teacher = EMATeacher(student, dtype=dtype, device=device)
    expected = EMATeacher(student, dtype=dtype).to(device)
    own, wanted, given = map(tensors, (teacher.module, expected.module, student))
    assert own.keys() == wanted.keys()
    for name, tensor in own.items():
        like, source = wanted[name], given[name]
        for of in ("device", "dtype", "shape", "requires_grad"):
            assert getattr(tensor, of) == getattr(like, of), name
        assert tensor.stride() == like.stride(), name
        assert device == "meta" or torch.equal(tensor, like), name
        # Module.to() meta makes plain parameters of all, and parts those that are tied.
        assert type(tensor) is type(source), name
        ties = [{n for n in own if of[n] is t} for of, t in ((own, tensor), (given, source))]
        assert ties[0] == ties[1], name
    assert teacher.state_dict().keys() == expected.state_dict().keys()


def test_a_teacher_elsewhere_holds_its_own_weights_wherever_its_modules_keep_them():
    student = Everything()
    teacher = EMATeacher(student, 0.0, warmup=None, device="cpu")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    x = torch.randn(5, 2, 4)
    before = teacher.module.recurrent(x)[0], teacher.module.derived(x)
    assert not torch.equal(before[0], student.recurrent(x)[0])
    teacher.update()
    torch.testing.assert_close(teacher.module.recurrent(x)[0], student.recurrent(x)[0])
    torch.testing.assert_close(teacher.module.derived(x), student.derived(x))


def test_what_no_copy_is_made_of_elsewhere_is_copied_and_moved():
    student = nn.Linear(3, 2)
    student.register_buffer("leaf", torch.ones(3, requires_grad=True))
    student.scale = nn.Buffer(torch.ones(3))
    student.held = [student.scale, torch.ones(3)]
    expected = copy.deepcopy(student)
    teacher = EMATeacher(student, device="meta")
    for name, tensor in tensors(teacher.module).items():
        assert tensor.is_meta and tensor.shape == tensors(expected)[name].shape, name
    assert not teacher.module.held[1].is_meta


def test_a_copy_for_which_there_is_no_memory_is_told_as_that():
    class Large(nn.Linear):
        def __deepcopy__(self, memo):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory"):
        EMATeacher(Large(3, 2))
