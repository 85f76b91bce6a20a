"""Two lists of tensors that a launch finds by a table, from one call with them to the next."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmt.ema_layout import Layout, unmoved
from fastmt.ema_objects import SameObjects
from fastmt.ema_table import TYPES, Entry, Table, is_capturing
from fastmt.reference import is_averaged

_MAX_TABLES = 8
_tables: OrderedDict[tuple[int, ...], Lists] = OrderedDict()
_captured: set[Lists] = set()  # whose tables a CUDA graph reads, nobody can tell until when


def lists(
    teacher: list[Tensor], student: list[Tensor], positions: Callable[..., Sequence[int]]
) -> Lists:
    """The table of two lists, from the last few; `positions` of a new one are checked first."""
    key = (len(teacher), *(_place(tensors[0]) for tensors in (teacher, student) if tensors))
    table = _tables.pop(key, None)
    if table is None or not table.is_of(teacher, student):
        table = Lists(teacher, student, positions(teacher, student))
    if is_capturing():
        _captured.add(table)
    _tables[key] = table  # the last of all, whatever other threads have put there meanwhile
    if len(_tables) > _MAX_TABLES:
        _tables.popitem(last=False)
    return table


def _place(tensor: Tensor) -> int:
    """Of its memory; of what has none, which is refused or left out, the object's own."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return id(tensor)


class Lists:
    """The table of two lists of tensors, and the positions of what it leaves out."""

    def __init__(
        self, teacher: list[Tensor], student: list[Tensor], positions: Sequence[int]
    ) -> None:
        device = next((t.device for t in teacher if t.dtype in TYPES), torch.device("cpu"))
        entries = {
            i: Entry(teacher[i], student[i], copies=not is_averaged(teacher[i])) for i in positions
        }
        self._served = [i for i in positions if entries[i].is_served(device)]
        self.table = Table([entries[i] for i in self._served], device)
        self.rest = [i for i in positions if i not in set(self._served)]
        self._others = [i for i in range(len(teacher)) if i not in set(self._served)]
        self._layout = Layout([*teacher, *student])
        self._last = _first_of(teacher, student)
        self._objects: SameObjects | None = None

    def is_of(self, teacher: list[Tensor], student: list[Tensor]) -> bool:
        """Whether the table holds for two lists.

        Objects that come again are held, since C++ then sees sooner whether they have moved;
        others, as the `data` of parameters, are only looked at.
        """
        if self._objects is not None and self._objects.are(teacher, student):
            return self._holds(teacher, student)
        if not self._layout.is_that_of([*teacher, *student]):
            return False
        first = _first_of(teacher, student)
        if _are_same(first, self._last):
            self._hold(teacher, student)
        self._last = first
        return True

    def _holds(self, teacher: list[Tensor], student: list[Tensor]) -> bool:
        watched = self._objects.watched
        looked_at = _pairs(teacher, student, [watched, *self._others])
        return self._unmoved() and self._looked_at.is_that_of(looked_at)

    def _hold(self, teacher: list[Tensor], student: list[Tensor]) -> None:
        objects = SameObjects(teacher, student, self._served)
        if objects.watched is None:
            return
        let_go = weakref.WeakMethod(self._let_go)
        objects.watch(teacher, student, lambda _: (method := let_go()) and method())
        watched, others = objects.watched, [i for i in self._served if i != objects.watched]
        self._looked_at = Layout(_pairs(teacher, student, [watched, *self._others]))
        self._unmoved = unmoved(_pairs(teacher, student, others))
        self._objects = objects

    def _let_go(self) -> None:
        self._objects = self._unmoved = None


def _pairs(teacher: list[Tensor], student: list[Tensor], positions: Sequence[int]) -> list[Tensor]:
    return [tensors[i] for i in positions for tensors in (teacher, student)]


def _first_of(*lists: list[Tensor]) -> list[weakref.ref[Tensor]]:
    return [weakref.ref(tensors[0]) for tensors in lists if tensors]


def _are_same(*firsts: list[weakref.ref[Tensor]]) -> bool:
    """Whether objects live and are the same: references themselves compare tensors by value."""
    pairs = zip(*firsts, strict=True)
    return all((first := one()) is not None and first is other() for one, other in pairs)
