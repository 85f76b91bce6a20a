"""Whether tensors lie where they did, and as they did: what a table of their addresses needs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmt import cpp_backend, native

try:  # what torch.compile tells with that its guards hold: in C++, ten times as fast as in Python
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None


class Layout:
    """Where tensors lie and how, to be compared with what is given later."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._same = _layout_check(list(tensors))

    def is_that_of(self, tensors: Sequence[Tensor]) -> bool:
        return (
            len(tensors) == len(self._addresses)
            and self._addresses == list(map(Tensor.data_ptr, tensors))
            and self._same(*tensors)
        )


def unmoved(tensors: Sequence[Tensor]) -> Callable[[], bool]:
    """A function that holds these tensors, and tells whether none has moved since.

    C++ looks at their records, which takes less time than Layout. Once it has said no it says no.
    """
    if tensors and cpp_backend.missing() is None:
        return _Held(tensors).lie_where_they_did
    layout = Layout(tensors)
    return lambda: layout.is_that_of(tensors)


class _Held:
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._key = torch.ops.fastmt.ema_hold_layouts(list(tensors))
        self._hold = native.ema_layouts_hold()
        weakref.finalize(self, torch.ops.fastmt.ema_release_layouts, self._key)

    def lie_where_they_did(self) -> bool:
        return self._hold(self._key)


def _layout_check(tensors: list[Tensor]) -> Callable[..., bool]:
    """A function that tells whether other tensors are read from memory as these are."""
    expected = list(map(_layout, tensors))

    def holds(*others: Tensor) -> bool:
        return expected == list(map(_layout, others))

    if not tensors or TensorGuards is None:
        return holds
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    same = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    # The guards also ask what does not matter here: autocast, inference mode, requires_grad.
    return lambda *others: same(*others) or holds(*others)


def _layout(tensor: Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...], bool]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg()
