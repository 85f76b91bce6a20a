"""Launches of kernels that were launched before, found by what their code depends on."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

T = TypeVar("T")
MOST = 4096  # launches that are remembered, and calls that are prepared
# Of Triton, whose compiled kernels are launched by the arguments in `_direct`. With each of these
# tests/test_stub_gpu.py has passed: the driver is told what the dispatcher tells it.
DIRECT = ((3, 6), (3, 7), (3, 8), (3, 9))
GIVEN = object()  # stands for an argument that comes at each launch
ALIGNED = 16  # bytes: from addresses that are multiples of it Triton reads in wider accesses
_compiled: dict[Hashable, tuple[Any, Callable[..., bool]]] = {}
_prepared: dict[Hashable, Any] = {}


class Launch:
    """A launch that is repeated: all of it is known but the arguments that are GIVEN.

    These are tensors, tuples of them, None or numbers that are not whole, and each is at every
    launch of the same kind, dtype and device: of a tensor only where it lies is asked.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        *arguments: Any,
        num_warps: int = 4,
        num_stages: int = 3,
        registers: int | None = None,
        **constants: Any,
    ) -> None:
        self._kernel, self._programs = kernel, programs
        options = {"num_warps": num_warps, "num_stages": num_stages, "registers": registers}
        self._constants = {**options, **constants}
        self._count, every = len(arguments), (*arguments, *constants.values())
        self._known = tuple([argument for argument in every if argument is not GIVEN])
        given, known = itertools.count(), itertools.count(len(every) - len(self._known))
        self._order = operator.itemgetter(
            *[next(given if argument is GIVEN else known) for argument in every]
        )
        self._places: tuple[list[int], list[int]] | None = None  # of tensors, of tuples of them
        self._direct: Callable[..., bool] | None = None  # for tensors that are all aligned

    def __call__(self, *given: Any) -> None:
        if self._places is None:
            tensors = [i for i, each in enumerate(given) if isinstance(each, Tensor)]
            tuples = [i for i, each in enumerate(given) if type(each) is tuple]
            self._places = tensors, tuples
        tensors, tuples = self._places
        passed, addresses = list(given), 0
        for place in tensors:
            passed[place] = address = given[place].data_ptr()
            addresses |= address
        for place in tuples:
            passed[place] = several = tuple([tensor.data_ptr() for tensor in given[place]])
            for address in several:
                addresses |= address
        aligned, direct = addresses % ALIGNED == 0, self._direct
        if aligned and direct and direct(self._programs, self._order((*passed, *self._known))):
            return
        arguments = self._order((*given, *self._known))[: self._count]
        direct = launch(self._kernel, self._programs, *arguments, **self._constants)
        if aligned:
            self._direct = direct


def launch(
    kernel: Any,
    programs: int,
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    registers: int | None = None,
    **constants: Any,
) -> Callable[..., bool] | None:
    """kernel[(programs,)](*arguments, **constants), the constants in the kernel's own order.

    registers: that a thread may have at most, on NVIDIA's GPUs, where the compiler would take more
        and can do with them, with nothing kept in memory; None leaves that to the compiler.
    From the second time on it does not ask Triton's dispatcher, which looks at each argument anew
    and takes longer than the launch itself. Returns what `_direct` made of the kernel, if anything.
    """
    values = tuple(constants.values())
    traits, passed = _read(arguments)
    key = (kernel.fn, num_warps, num_stages, registers, values, *traits)
    known = _compiled.get(key)
    if known is not None:
        made, direct = known
        if not direct(programs, (*passed, *values)):
            made[(programs, 1, 1)](*arguments, *values)
        return direct
    if list(constants) != (names := kernel.arg_names[len(arguments) :]):
        raise TypeError(f"{kernel.fn.__name__}: got constants {list(constants)}, expected {names}")
    # Fused a * b + c, which is Triton's default up to 3.9, and not from 3.10 on.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if registers is not None:
        compiled = partial(kernel.warmup, *arguments, grid=(programs,), **constants, **options)
        if registers_of(compiled())[0] > registers:
            _, spilled = registers_of(compiled(maxnreg=registers))
            options |= {} if spilled else {"maxnreg": registers}
    made = kernel[(programs,)](*arguments, **constants, **options)
    if isinstance(made, triton.compiler.CompiledKernel) and not torch.version.hip:
        _keep(_compiled, key, (made, _direct(made)))
    return None


def registers_of(made: Any) -> tuple[int, int]:
    """How many a thread of a compiled kernel takes, and how many it keeps in memory.

    The driver says so of what is loaded, as it is when Triton is asked how it runs.
    """
    _ = made.run
    return made.n_regs, made.n_spills


def target() -> GPUTarget | None:
    """The kind of GPU that Triton compiles for; None where there is none, but the interpreter."""
    try:
        return driver.active.get_current_target()
    except RuntimeError:
        return None


def prepared(key: Hashable, prepare: Callable[..., T], *arguments: Any) -> T:
    """prepare(*arguments), once for each key, which says all that the answer depends on.

    The answer must not hold tensors.
    """
    found = _prepared.get(key)
    return found if found is not None else _keep(_prepared, key, prepare(*arguments))


def forget() -> None:
    """Prepare every call anew: for another device than the tensors' own, or in a test."""
    _prepared.clear()


def layout_of(tensor: Tensor | None) -> Hashable:
    """What a call is prepared for, of a tensor."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device()


def _keep(memory: dict[Hashable, T], key: Hashable, value: T) -> T:
    if len(memory) >= MOST:
        memory.clear()
    memory[key] = value
    return value


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
            traits.append((argument.dtype, argument.get_device(), address % ALIGNED == 0))
            argument = address
        elif kind is tuple and argument and isinstance(argument[0], Tensor):
            own, addresses = _read(argument)
            traits.append(tuple(own))
            argument = tuple(addresses)
        else:
            traits.append(argument)
        passed.append(argument)
    return traits, passed


def _direct(made: Any) -> Callable[..., bool]:
    """What launches a compiled kernel as it does itself, with all arguments, if it can.

    Not where a hook wants to know of launches, as a profiler's does.
    """
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version not in DIRECT or type(made) is not triton.compiler.CompiledKernel:
        return lambda programs, arguments: False
    driver, runtime = triton.runtime.driver.active, triton.knobs.runtime
    device, stream_of = driver.get_current_device(), driver.get_current_stream
    hand_over, how, is_one = _hand_over(made, version)

    def direct(programs: int, arguments: tuple[Any, ...]) -> bool:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            return False
        passed = (arguments,) if is_one else arguments
        # Asked of `made`, which is kept by that: its end unloads the code, from Triton 3.9 on.
        hand_over(programs, 1, 1, stream_of(device), made.function, *how, *passed)
        return True

    return direct


def _hand_over(made: Any, version: tuple[int, int]) -> tuple[Callable[..., None], tuple, bool]:
    """What hands a launch to the driver, how, and whether it takes the arguments as one.

    Within Triton's launcher that is what it calls once it has made room for a kernel that asks for
    some; of ours none does. A build that is no release (3.7.0+git) may have another launcher.
    """
    run, asked = made.run, (made.packed_metadata, None, None, None)
    if "+" in triton.__version__:
        return run, asked, False
    if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return run, asked, False
    grid, room = (run.launch_cooperative_grid, run.launch_pdl), (None, None)
    if version == (3, 6):
        return run.launch, (*grid, *room, *asked), False
    return run.launch, (*grid, *asked, *room, run.arg_annotations, run.kernel_signature), True
