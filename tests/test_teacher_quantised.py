"""Students that hold weights as codes and scales, in a subclass of tensors without arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
from followed import assert_same
from torch import Tensor, nn

from fastmt import EMATeacher

aten = torch.ops.aten


class Quantised(Tensor):
    """Codes and a scale that tell to be float32, of which there are copies alone."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(pieces, context, size, stride):
        return Quantised(**pieces)

    def pieces(self) -> tuple[Tensor, Tensor]:
        return self.codes, self.scale

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        if operation is aten.copy_.default:
            for to, value in zip(args[0].pieces(), args[1].pieces(), strict=True):
                to.copy_(value)
            return args[0]
        if operation in (aten.detach.default, aten.clone.default, aten.alias.default):
            return cls(*(operation(piece) for piece in args[0].pieces()))
        raise NotImplementedError(f"Quantised: {operation}")


def quantised(out: int) -> nn.Parameter:
    codes = torch.randint(-9, 9, (out, 3), dtype=torch.int8)
    return nn.Parameter(Quantised(codes, torch.rand(out, 1)), requires_grad=False)


@pytest.fixture
def student():
    """A frozen base in codes beside a layer that is trained."""
    torch.manual_seed(0)
    student = nn.ModuleDict({"base": nn.Linear(3, 4, bias=False), "adapter": nn.Linear(3, 4)})
    student["base"].weight = quantised(4)
    return student


@pytest.mark.parametrize(
    "update",
    [{}, {"finite": torch.tensor(True)}, {"decay": torch.tensor(0.5, dtype=torch.float64)}],
    ids=["by a number", "where finite", "by a tensor"],
)
def test_a_frozen_weight_that_has_no_average_is_copied_and_the_rest_averaged(student, update):
    teacher = EMATeacher(student, 0.5, warmup=None)
    started = teacher.module["adapter"].weight.clone()
    for _ in range(2):  # frozen, and loaded anew
        with torch.no_grad():
            student["adapter"].weight.copy_(started).add_(2)
            teacher.module["adapter"].weight.copy_(started)
        teacher.update(**update)
        for mine, own in zip(
            teacher.module["base"].weight.pieces(), student["base"].weight.pieces(), strict=True
        ):
            assert torch.equal(mine, own) and mine.data_ptr() != own.data_ptr()
        torch.testing.assert_close(teacher.module["adapter"].weight, started + 1)
        student["base"].weight = quantised(4)


def test_a_skipped_update_copies_no_weight_that_has_no_average(student):
    teacher = EMATeacher(student, 0.5, warmup=None)
    before = [piece.clone() for piece in teacher.module["base"].weight.pieces()]
    student["base"].weight = quantised(4)
    teacher.update(finite=torch.tensor(False))
    teacher.update(decay=torch.tensor(-1.0, dtype=torch.float64))
    assert all(map(torch.equal, teacher.module["base"].weight.pieces(), before))


@pytest.mark.parametrize("rule", ["copy", "ema"])
def test_a_buffer_that_has_no_average_is_copied_also_where_buffers_are_averaged(student, rule):
    student.register_buffer("codes", quantised(2).detach())
    teacher = EMATeacher(student, 0.5, warmup=None, buffers=rule)
    student.codes = quantised(2).detach()
    teacher.update()
    assert all(map(torch.equal, teacher.module.codes.pieces(), student.codes.pieces()))


def test_rounding_loses_nothing_of_a_weight_that_has_no_average(student):
    student["adapter"].bfloat16()
    codes, scale = student["base"].weight.pieces()
    base = Quantised(codes, scale.bfloat16())
    student["base"].weight = nn.Parameter(base, requires_grad=False)
    teacher = EMATeacher(student, 0.5, rounding="kahan")
    teacher.update()
    progress = teacher.progress()
    assert progress["compensation"].keys() == {"adapter.weight", "adapter.bias"}
    teacher.load_progress(progress)
    teacher.update()


def train(student: nn.Module) -> None:
    student["base"].weight.requires_grad_()


def dequantise(student: nn.Module) -> None:
    student["base"].weight = nn.Parameter(torch.ones(4, 3), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (train, "cannot be averaged .* where it requires no grad alone"),
        (dequantise, "is Parameter, in the teacher Quantised, .* make a new EMATeacher"),
    ],
)
def test_a_weight_that_can_be_neither_averaged_nor_copied_is_named_and_nothing_changes(
    student, change, found
):
    teacher = EMATeacher(student, 0.5, warmup=None)
    before = copy.deepcopy(teacher.module["adapter"])
    change(student)
    with torch.no_grad():
        student["adapter"].weight.add_(2)
    with pytest.raises(TypeError, match=f"^student: 'base.weight' .*{found}"):
        teacher.update()
    assert_same(teacher.module["adapter"], before)
    assert teacher.calls == 0
