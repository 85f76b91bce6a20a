"""Two lists of tensors that are given at every step, told by the objects that they hold."""

from __future__ import annotations

import operator
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor

from fastmt import cpp_backend, native


class SameObjects:
    """Two lists of tensors: kept alive, but for one pair that is watched.

    C++ that holds a tensor keeps its Python object alive as well, so that weak references to what
    is held would never end. The end of the watched pair stands for that of its lists.
    """

    def __init__(
        self, teacher: list[Tensor], student: list[Tensor], candidates: Sequence[int]
    ) -> None:
        """candidates: positions of which the first that occurs once is watched."""
        uses = Counter(map(id, [*teacher, *student]))
        alone = (i for i in candidates if uses[id(teacher[i])] == uses[id(student[i])] == 1)
        self.watched = next(alone, None)
        self._kept = [_without(tensors, self.watched) for tensors in (teacher, student)]
        self._addresses = [array("q", map(id, tensors)) for tensors in (teacher, student)]
        self._ends: list[weakref.ref[Tensor]] = []
        self._native = native.list_holds() if cpp_backend.missing() is None else None
        self._item = native.address_of("PyList_GetItem")

    def watch(self, teacher: list[Tensor], student: list[Tensor], forget: Callable) -> None:
        """Call `forget` when one of the watched pair ends."""
        self._ends = [weakref.ref(tensors[self.watched], forget) for tensors in (teacher, student)]

    def are(self, teacher: list[Tensor], student: list[Tensor]) -> bool:
        """Whether the lists, as they are watched, hold the same objects.

        Never by the comparison of lists, which compares the values of tensors that differ.
        """
        lists = teacher, student
        if list(map(len, lists)) != list(map(len, self._kept)):
            return False
        for end, tensors in zip(self._ends, lists, strict=True):
            if end() is not tensors[self.watched]:
                return False
        return all(map(self._hold, lists, self._kept, self._addresses))

    def _hold(
        self, tensors: list[Tensor], kept: list[Tensor | None], addresses: array[int]
    ) -> bool:
        if self._native is not None:
            return self._native(id(tensors), addresses.buffer_info()[0], len(tensors), self._item)
        return all(map(operator.is_, _without(tensors, self.watched), kept))


def _without(tensors: list[Tensor], position: int | None) -> list[Tensor | None]:
    kept: list[Tensor | None] = list(tensors)
    if position is not None:
        kept[position : position + 1] = [None]
    return kept
