"""Launches of kernels that were launched before, found by what their code depends on."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
from torch import Tensor

MOST = 4096  # launches that are remembered
_compiled: dict[Hashable, Any] = {}


def launch(
    kernel: Any,
    programs: int,
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    **constants: Any,
) -> None:
    """kernel[(programs,)](*arguments, **constants), the constants in the kernel's own order.

    From the second time on it does not ask Triton's dispatcher, which looks at each argument anew
    and takes longer than the launch itself.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    values = tuple(constants.values())
    key = (kernel.fn, num_warps, num_stages, values, tuple(map(_trait, arguments)))
    known = _compiled.get(key)
    if known is not None:
        known[(programs, 1, 1)](*arguments, *values)
        return
    if list(constants) != (names := kernel.arg_names[len(arguments) :]):
        raise TypeError(f"{kernel.fn.__name__}: got constants {list(constants)}, expected {names}")
    made = kernel[(programs,)](*arguments, **constants, **options)
    if isinstance(made, triton.compiler.CompiledKernel) and not torch.version.hip:
        if len(_compiled) >= MOST:
            _compiled.clear()
        _compiled[key] = made


def _trait(argument: Any) -> Hashable:
    """What Triton may specialise code on: of a number that is not whole only that it is one.

    Of a tensor its dtype, its device and whether it is aligned. On AMD also how much memory it is
    of, which is why nothing is remembered there.
    """
    if isinstance(argument, Tensor):
        return argument.dtype, argument.get_device(), argument.data_ptr() % 16 == 0
    if isinstance(argument, float):
        return float
    if isinstance(argument, tuple) and argument and isinstance(argument[0], Tensor):
        return tuple(map(_trait, argument))
    return argument
