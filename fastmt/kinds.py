"""What a check may ask of arguments, so that its answer holds for all that are alike."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor, nn

_NUMBERS = frozenset((bool, int, float))
_SEQUENCES = frozenset((list, tuple, torch.Size))


def kinds_of(arguments: Iterable[object]) -> tuple[Hashable, ...] | None:
    """The arguments themselves, but of tensors all except strides and values.

    None where one may be anything: a subclass, a tensor that is not strided, NumPy's numbers.
    """
    kinds: list[Hashable] = []
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is nn.Parameter:
            if argument.layout is not torch.strided:
                return None
            how = (argument.shape, argument.dtype, argument.device, argument.requires_grad)
            kinds.append(how)
        elif argument is None or kind is str:
            kinds.append(argument)
        elif kind in _NUMBERS:
            kinds += kind, argument  # 1 == 1.0 == True
        elif kind in _SEQUENCES:
            inner = kinds_of(argument)
            if inner is None:
                return None
            kinds.append(inner)
        else:
            return None
    return tuple(kinds)
