"""What a checkpoint may hold: entries that a load without code from the file gives back."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN = (bool, int, float, str, type(None))
_TENSORS = (Tensor, nn.Parameter)


def plain(value: Any, where: str) -> Any:
    """A copy in plain numbers; refuses by the exact type what a load without code would refuse."""
    if isinstance(value, np.generic):
        value = value.item()
    kind = type(value)
    if kind in (list, tuple):
        return kind(plain(item, f"{where}[{index}]") for index, item in enumerate(value))
    if kind in (dict, OrderedDict, Counter):  # MultiStepLR keeps its milestones in a Counter
        copied = copy.copy(value)  # with the versions that a state dict tells beside its entries
        for key, item in value.items():
            if type(key) not in _PLAIN:
                raise TypeError(f"{where}: got a {type(key).__name__} as key, expected a string")
            copied[key] = plain(item, f"{where}[{key!r}]")
        return copied
    if kind not in _PLAIN and kind not in _TENSORS:
        raise TypeError(
            f"{where}: got {kind.__name__}, expected a dict, list, tuple, tensor, number or string"
        )
    if kind in _TENSORS:
        _check_single(where, value)
        _check_memory(where, value)
    return value


def check_dense(name: object, value: object) -> None:
    """TypeError for an entry of a state dict that no safetensors file holds."""
    if not isinstance(name, str):
        raise TypeError(f"state_dict: got a {type(name).__name__} as key, expected a string")
    where = f"state_dict[{name!r}]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: got {type(value).__name__}, expected a tensor")
    _check_single(where, value)
    if value.layout != torch.strided or value.is_quantized:
        kind = value.dtype if value.is_quantized else value.layout
        raise TypeError(f"{where}: is {kind}, expected a dense tensor")
    _check_memory(where, value)


def _check_single(where: str, tensor: Tensor) -> None:
    """TypeError for one that holds others: from PyTorch 2.15 on no load without code builds it."""
    if is_traceable_wrapper_subclass(tensor) or tensor.is_nested:
        raise TypeError(f"{where}: is made of other tensors, expected a single one")


def _check_memory(where: str, tensor: Tensor) -> None:
    """TypeError for a tensor of which there is nothing to write."""
    if tensor.is_meta or tensor.is_mkldnn:
        kind = "on the meta device" if tensor.is_meta else tensor.layout
        raise TypeError(f"{where}: is {kind}, expected a tensor with memory")
    dense = tensor.layout == torch.strided and tensor.numel() > 0
    if dense and not tensor.untyped_storage().nbytes():
        raise TypeError(f"{where}: its storage was freed, expected memory")
