"""Exponential moving average of many tensors, in place, in one launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastmt import arguments, backends, ema_lists, ema_table, reference
from fastmt.ema_bound import (
    AVERAGE,
    COPY,
    Bound,
    Rest,
    Row,
    has_kernels,
    is_expanded,
    is_served,
    place_of,
    storage_of,
    update_eagerly,
)
from fastmt.ema_objects import SameObjects

_MAX_BINDINGS = 8  # of lists that are updated in turn
_bindings: OrderedDict[tuple[int, int], _Binding] = OrderedDict()


def ema_update_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float | Tensor
) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, in place, in one launch.

    What the launch does not take is averaged tensor by tensor: float64, complex, layouts that
    differ.

    Args:
        teacher: tensors of any shape and floating or complex dtype; integer, bool and float8 ones
            become copies of the student's. A tensor that occurs twice (tied parameters) is averaged
            once.
        student: tensors of the same shapes, in the same order; never written.
        decay: in [0, 1], a float or a 0-dim tensor; one on a GPU is read there alone, unchecked. 0
            copies, also over a NaN, and 1 keeps, also beside one.

    The first call with these tensors checks and binds them (some microseconds each), further ones
    only look whether they are the same objects and have kept their layout. They are let go when
    one of the first teacher and the first student is.

    Not differentiable. The teacher's version counters are bumped, so that autograd notices.

    Raises:
        TypeError, ValueError: lengths or shapes that differ, a decay outside [0, 1], a teacher and
        a student that share storage, what is no tensor, or one without memory of its own.
    """
    if isinstance(decay, Tensor):
        arguments.check_real_tensor("decay", decay)
        if decay.ndim:
            raise ValueError(f"decay: got shape {arguments.shape(decay)}, expected a 0-dim tensor")
    else:
        arguments.check_between("decay", decay, 0, 1)
        decay = decay if type(decay) is float else float(decay)  # a fraction is none of PyTorch's
    teacher, student = _listed("teacher", teacher), _listed("student", student)
    if torch.compiler.is_compiling():
        _update_traced(teacher, student, torch.as_tensor(decay, dtype=torch.float64))
        return
    if isinstance(decay, Tensor) and decay.is_cpu:
        arguments.check_between("decay", float(decay), 0, 1)
        if not ema_table.is_capturing():  # else replays read what it holds by then
            decay = float(decay)  # a copy of it would wait for the device
    first = _representatives(teacher)
    choice = backends.choose("ema_update_", first)
    if choice.backend == "eager":
        pairs = [(teacher[i], student[i]) for i in _checked(teacher, student)]
        reference.ema_update_([t for t, _ in pairs], [s for _, s in pairs], decay)
        return
    if ema_table.is_read_by(choice.backend, ema_table.are_on_host(first)):
        _update_on_device(backends.operations(choice.backend), teacher, student, decay)
        return
    binding = _bindings.get(_key(teacher, student))
    if binding is None or not binding.holds(teacher, student):
        binding = _bind(teacher, student)
    increment_version(teacher)  # after holds(), which brings the tensors' records near
    if not binding.run(teacher, student, float(decay)):
        _bind(teacher, student).run(teacher, student, float(decay))


def _listed(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    listed = list(tensors) if isinstance(tensors, Iterable) else [tensors]
    if listed and not isinstance(listed[0], Tensor):  # a module, or the names of a state dict
        kind = type(tensors).__name__
        raise TypeError(f"{name}: got {kind}, expected a sequence of tensors, as list(parameters)")
    return listed


@torch.library.custom_op("fastmt::ema_update_traced_", mutates_args=("teacher",))
def _update_traced(teacher: list[Tensor], student: list[Tensor], decay: Tensor) -> None:
    """The launch as a node of a compiled graph, which has no addresses while it is traced."""
    ema_update_(teacher, student, decay)


def _update_on_device(
    kernels: Any, teacher: list[Tensor], student: list[Tensor], decay: float | Tensor
) -> None:
    lists = ema_lists.lists(teacher, student, _checked)
    lists.table.update(kernels, ema_table.decay_on(lists.table.rows.device, decay))
    rest = [(teacher[i], student[i]) for i in lists.rest]
    reference.ema_update_([t for t, _ in rest], [s for _, s in rest], decay)
    increment_version(teacher)


def _representatives(tensors: list[Tensor]) -> list[Tensor]:
    """The tensor that decides where the launch runs: the first that may be part of it, if any.

    The binding sorts out the others.
    """
    floating = None
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            _check_memory("teacher", tensors)
        if has_kernels(tensor):
            return [tensor]
        if floating is None and tensor.is_floating_point():
            floating = tensor
    return [] if floating is None else [floating]


def _checked(teacher: list[Tensor], student: list[Tensor]) -> list[int]:
    """The positions to average: of pairs that fit each other, tied ones once."""
    if len(teacher) != len(student):
        raise ValueError(f"student: got {len(student)} tensors, expected {len(teacher)} as teacher")
    for name, tensors in (("teacher", teacher), ("student", student)):
        _check_memory(name, tensors)
    storages = {storage_of(t) for t in teacher if t.numel()}
    positions: dict[int, int] = {}
    for i, (average, value) in enumerate(zip(teacher, student, strict=True)):
        if average.shape != value.shape:
            raise ValueError(
                f"student[{i}]: got shape {arguments.shape(value)}, expected "
                f"{arguments.shape(average)} as teacher[{i}]"
            )
        kinds = [(t.is_floating_point(), t.is_complex()) for t in (average, value)]
        if kinds[0] != kinds[1]:
            raise TypeError(f"student[{i}]: got {value.dtype}, teacher[{i}] is {average.dtype}")
        if value.numel() and storage_of(value) in storages:
            raise ValueError(f"student[{i}]: shares storage with the teacher; clone one of them")
        if average.numel():
            first = positions.setdefault(place_of(average), i)
            if teacher[first].numel() != average.numel():
                raise ValueError(
                    f"teacher[{i}]: shares memory with teacher[{first}], which has another size; "
                    "give one of them"
                )
    return list(positions.values())


def _check_memory(name: str, tensors: list[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{i}]: got {type(tensor).__name__}, expected a tensor")
        if tensor.is_meta or tensor.layout != torch.strided:
            kind = "on the meta device" if tensor.is_meta else tensor.layout
            raise TypeError(f"{name}[{i}]: is {kind}, expected a dense tensor with memory")
        if tensor.numel() and not storage_of(tensor):
            raise ValueError(f"{name}[{i}]: its storage was freed, expected memory")
        if name == "teacher" and is_expanded(tensor):
            raise ValueError(f"{name}[{i}]: several elements are one place in memory; clone it")


def _row(position: int, average: Tensor, value: Tensor) -> Row:
    mode = AVERAGE if reference.is_averaged(average) else COPY
    return Row(position, (average,), value, (mode,), (None,))


class _Binding:
    """Two lists of tensors as they were bound."""

    def __init__(self, teacher: list[Tensor], student: list[Tensor]) -> None:
        positions = _checked(teacher, student)
        rows = {i: _row(i, teacher[i], student[i]) for i in positions}
        fits = {i: is_served(row) for i, row in rows.items()}
        served = [i for i in positions if fits[i]]
        self._rest = Rest([rows[i] for i in positions if not fits[i]])
        others = set(range(len(teacher))).difference(positions)  # empty, or tied to another
        self._left_out = Rest([_row(i, teacher[i], student[i]) for i in others])
        self.objects = SameObjects(teacher, student, served)
        served.sort(key=lambda i: i != self.objects.watched)
        self._first = served[:1]
        self._bound = Bound([rows[i] for i in served], watch=True) if served else None

    def holds(self, teacher: list[Tensor], student: list[Tensor]) -> bool:
        """Whether these are its tensors, and those of them that it holds have kept their layout."""
        return (
            self.objects.are(teacher, student)
            and self._rest.holds()
            and self._left_out.holds()
            and (self._bound is None or self._bound.holds())
        )

    def run(self, teacher: list[Tensor], student: list[Tensor], decay: float) -> bool:
        """Right after holds(). False, with nothing done, where the others' layout has changed."""
        first = [tensors[i] for i in self._first for tensors in (teacher, student)]
        if self._bound is not None and not self._bound.run_with(first, [decay], [0]):
            return False
        for row in self._rest.rows:
            update_eagerly(row, [decay], [0])
        return True


def _bind(teacher: list[Tensor], student: list[Tensor]) -> _Binding:
    """A new binding, remembered while the pair that it watches lives."""
    key = _key(teacher, student)
    _bindings.pop(key, None)
    binding = _Binding(teacher, student)
    if binding.objects.watched is not None:
        binding.objects.watch(teacher, student, lambda _: _bindings.pop(key, None))
        _bindings[key] = binding
        if len(_bindings) > _MAX_BINDINGS:
            _bindings.popitem(last=False)
    return binding


def _key(teacher: list[Tensor], student: list[Tensor]) -> tuple[int, int]:
    """By what a binding is found; its tensors tell whether it is the right one."""
    return id(teacher[0]) if teacher else 0, id(student[0]) if student else 0
