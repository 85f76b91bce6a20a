"""Exponential moving average of many tensors, in place, in one launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastmt import arguments, backends, reference

try:  # what torch.compile tells with that its guards hold: in C++, ten times as fast as in Python
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

CHUNK = 16 * 1024  # elements in one piece of work, as in csrc/cpu/ema.cpp
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/cpu/calls.h
_MAX_TABLES = 8
_tables: OrderedDict[tuple[int, ...], _Table] = OrderedDict()


def ema_update_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float | Tensor
) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, in place, all tensors in one launch.

    Args:
        teacher: tensors of any shape and floating dtype; integer and bool tensors become copies of
            the student's. A tensor that occurs twice (tied parameters) is averaged once.
        student: tensors of the same shapes, in the same order; never written.
        decay: in [0, 1], a float or a 0-dim tensor.

    Not differentiable. The teacher's version counters are bumped, so that autograd notices.

    Raises:
        TypeError, ValueError: lengths, shapes or devices that differ, a decay outside [0, 1], a
        teacher and a student that share storage.
    """
    if isinstance(decay, Tensor):
        if decay.ndim:
            raise ValueError(f"decay: got shape {arguments.shape(decay)}, expected a 0-dim tensor")
    elif not 0 <= decay <= 1:
        raise ValueError(f"decay: got {decay!r}, expected a number in [0, 1]")
    teacher, student = list(teacher), list(student)
    choice = backends.choose("ema_update_", _representatives(teacher))
    if choice.backend == "eager":
        pairs = _checked_pairs(teacher, student)
        reference.ema_update_([t for t, _ in pairs], [s for _, s in pairs], decay)
        return
    table = _table_for(teacher, student)
    kernels = backends.operations(choice.backend)
    kernels.ema_update_(table.rows, table.starts, _on_device(decay, table.rows.device))
    if table.rest:
        reference.ema_update_(
            [teacher[i] for i in table.rest], [student[i] for i in table.rest], decay
        )
    increment_version(teacher)


def _on_device(decay: float | Tensor, device: torch.device) -> Tensor:
    if not isinstance(decay, Tensor):
        return torch.full((), decay, dtype=torch.float64, device=device)
    return decay.detach().to(device, torch.float64, non_blocking=True)


def _representatives(tensors: list[Tensor]) -> list[Tensor]:
    """The tensor that decides where the launch runs: the first one of a dtype it serves, if any.

    The table sorts out the others.
    """
    floating = None
    for tensor in tensors:
        if tensor.dtype in _TYPES:
            return [tensor]
        if floating is None and tensor.is_floating_point():
            floating = tensor
    return [] if floating is None else [floating]


def _checked_pairs(teacher: list[Tensor], student: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The pairs to average: all that fit each other, tied ones once."""
    if len(teacher) != len(student):
        raise ValueError(f"student: got {len(student)} tensors, expected {len(teacher)} as teacher")
    storages = {t.untyped_storage().data_ptr() for t in teacher if t.numel()}
    pairs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for i, (average, value) in enumerate(zip(teacher, student, strict=True)):
        if average.shape != value.shape:
            raise ValueError(
                f"student[{i}]: got shape {arguments.shape(value)}, expected "
                f"{arguments.shape(average)} as teacher[{i}]"
            )
        if average.is_floating_point() != value.is_floating_point():
            raise TypeError(f"student[{i}]: got {value.dtype}, teacher[{i}] is {average.dtype}")
        if value.numel() and value.untyped_storage().data_ptr() in storages:
            raise ValueError(f"student[{i}]: shares storage with the teacher; clone one of them")
        if average.numel():
            pairs.setdefault((average.data_ptr(), average.numel()), (average, value))
    return list(pairs.values())


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def kernel_serves(average: Tensor, value: Tensor) -> bool:
    """Whether the kernel can walk both tensors as one stretch of memory."""
    same_memory_order = average.stride() == value.stride() or (
        average.is_contiguous() and value.is_contiguous()
    )
    return (
        average.dtype in _TYPES
        and value.dtype in _TYPES
        and average.device == value.device
        and same_memory_order
        and _is_dense(average)
    )


class _Table:
    """Addresses of tensor pairs as the kernel reads them, and what shows that they still hold."""

    def __init__(self, teacher: list[Tensor], student: list[Tensor]) -> None:
        pairs = _checked_pairs(teacher, student)
        device = next((t.device for t in _representatives(teacher)), torch.device("cpu"))
        served = [(t, s) for t, s in pairs if t.device == device and kernel_serves(t, s)]
        rows = [
            (t.data_ptr(), s.data_ptr(), t.numel(), _TYPES[t.dtype], _TYPES[s.dtype])
            for t, s in served
        ]
        table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)
        chunks = (table[:, 2] + CHUNK - 1) // CHUNK
        self.rows = table.to(device)
        self.starts = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)]).to(device)
        position = {id(tensor): i for i, tensor in enumerate(teacher)}
        in_launch = {id(t) for t, _ in served}
        self.rest = [position[id(t)] for t, _ in pairs if id(t) not in in_launch]
        self._addresses = list(map(Tensor.data_ptr, [*teacher, *student]))
        self._same_layouts = _layout_check([*teacher, *student])

    def fits(self, teacher: list[Tensor], student: list[Tensor]) -> bool:
        tensors = [*teacher, *student]
        return (
            len(tensors) == len(self._addresses)
            and self._addresses == list(map(Tensor.data_ptr, tensors))
            and self._same_layouts(*tensors)
        )


def _layout_check(tensors: list[Tensor]) -> Callable[..., bool]:
    """A function that tells whether other tensors have the dtypes, sizes and strides of these."""
    if not tensors or TensorGuards is None:
        expected = list(map(_layout, tensors))
        return lambda *others: expected == list(map(_layout, others))
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def _layout(tensor: Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.dtype, tensor.shape, tensor.stride()


def _table_for(teacher: list[Tensor], student: list[Tensor]) -> _Table:
    key = (len(teacher), *(tensors[0].data_ptr() for tensors in (teacher, student) if tensors))
    table = _tables.get(key)
    if table is None or not table.fits(teacher, student):
        table = _tables[key] = _Table(teacher, student)
    _tables.move_to_end(key)
    if len(_tables) > _MAX_TABLES:
        _tables.popitem(last=False)
    return table
