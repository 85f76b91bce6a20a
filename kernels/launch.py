"""Launches of kernels that were launched before, found by what their code depends on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

MOST = 4096  # launches that are remembered
# Of Triton, whose compiled kernels take the arguments of `_direct`; others are asked in public.
DIRECT = ((3, 6), (3, 7))
_compiled: dict[Hashable, Callable[..., None]] = {}


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
    values = tuple(constants.values())
    traits, passed = _read(arguments)
    key = (kernel.fn, num_warps, num_stages, values, *traits)
    known = _compiled.get(key)
    if known is not None:
        known(programs, arguments, passed, values)
        return
    if list(constants) != (names := kernel.arg_names[len(arguments) :]):
        raise TypeError(f"{kernel.fn.__name__}: got constants {list(constants)}, expected {names}")
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made = kernel[(programs,)](*arguments, **constants, **options)
    if isinstance(made, triton.compiler.CompiledKernel) and not torch.version.hip:
        if len(_compiled) >= MOST:
            _compiled.clear()
        _compiled[key] = _launcher(made)


def _read(arguments: Sequence[Any]) -> tuple[list[Hashable], list[Any]]:
    """What Triton may specialise code on, and the arguments with addresses in place of tensors.

    Of a number that is not whole only that it is one; of a tensor its dtype, its device and whether
    it is aligned. On AMD also how much memory it is of, which is why nothing is remembered there.
    """
    traits: list[Hashable] = []
    passed: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        if kind is float:
            traits.append(float)
        elif kind is int or argument is None:
            traits.append(argument)
        elif isinstance(argument, Tensor):
            address = argument.data_ptr()
            traits.append((argument.dtype, argument.get_device(), address % 16 == 0))
            argument = address
        elif kind is tuple and argument and isinstance(argument[0], Tensor):
            own, addresses = _read(argument)
            traits.append(tuple(own))
            argument = tuple(addresses)
        else:
            traits.append(argument)
        passed.append(argument)
    return traits, passed


def _launcher(made: Any) -> Callable[..., None]:
    """What launches a compiled kernel with (programs, arguments, the same as `passed`, values)."""

    def public(programs, arguments, _, values):
        made[(programs, 1, 1)](*arguments, *values)

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version not in DIRECT or type(made) is not triton.compiler.CompiledKernel:
        return public
    return _direct(made, public)


def _direct(made: Any, public: Callable[..., None]) -> Callable[..., None]:
    """Launches as CompiledKernel does, without the hooks of a profiler, where there are none."""
    driver, runtime = triton.runtime.driver.active, triton.knobs.runtime
    device, stream_of = driver.get_current_device(), driver.get_current_stream
    run, function, metadata = made.run, made.function, made.packed_metadata

    def direct(programs, arguments, passed, values):
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            public(programs, arguments, passed, values)
            return
        stream = stream_of(device)
        run(programs, 1, 1, stream, function, metadata, None, None, None, *passed, *values)

    return direct
