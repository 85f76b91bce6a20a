"""The teacher's network: copied from the student's, in a dtype in which an average moves."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Container, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastmt.matching import Pair, is_sharded, local, matched, plain_name, reshard, unwrapped
from fastmt.rounding import HALVES
from fastmt.teacher_functions import check_functions

carrying: set[nn.Module] = set()  # students that carry a teacher's weights for the time being
_lending = threading.Lock()


def copied(network: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """A copy with memory of its own, on another `device` where one is given."""
    for name, tensor in _named_tensors(network):
        if is_lazy(tensor):
            raise ValueError(
                f"student: {name!r} has no shape yet, expected a network that has seen a batch"
            )
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # parameters of a copy would be no leaves
            raise TypeError(
                f"student: {name or type(module).__name__!r} is scripted, which has no copy; make "
                "the teacher of the network that was scripted, whose parameters it shares"
            )
    elsewhere = {} if device is None else _copies_on(device, network)
    try:
        twin = copy.deepcopy(network, elsewhere)
    except torch.OutOfMemoryError:  # also a RuntimeError
        raise
    except (AssertionError, RuntimeError, TypeError) as error:
        kind = type(network).__name__
        raise TypeError(
            f"student: {kind} cannot be copied ({error}); {_remedy(network, error)}"
        ) from error
    for buffer in twin.buffers():  # parameters have memory of their own from deepcopy
        buffer.data = buffer.data.clone()
    check_functions(network, twin)
    return twin if device is None else twin.to(device)


@torch.no_grad()
def _copies_on(device: torch.device | str, network: nn.Module) -> dict[int, object]:
    """What deepcopy is to take for parameters and buffers, by their ids.

    Those that it makes itself lie beside the student's, where there may be no room for them. It
    does make what has a copy of another kind: subclasses, graph leaves, what carries attributes.
    """
    copies: dict[int, object] = {}
    for _, tensor in _named_tensors(network):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            continue
        if type(tensor).__deepcopy__ is nn.Parameter.__deepcopy__:
            data = tensor.data.to(device, copy=True)
            copies[id(tensor)] = type(tensor)(data, tensor.requires_grad)
        elif type(tensor) is Tensor and not tensor.requires_grad and not vars(tensor):
            copies[id(tensor)] = tensor.to(device, copy=True)
    return copies


def _named_tensors(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [*network.named_parameters(), *network.named_buffers()]


def _remedy(network: nn.Module, error: Exception) -> str:
    """What lets a network be copied that cannot be."""
    if is_sharded(network):
        return "make the teacher first, then shard student and teacher.module alike"
    for name, tensor in _named_tensors(network):
        if tensor.layout != torch.strided:
            return (
                f"{name!r} is {tensor.layout}, expected dense parameters; a sparse buffer can be "
                "torch.sparse_coo with buffers='keep'"
            )
    if isinstance(error, TypeError):  # of what is no tensor
        return "make the teacher before it has such an attribute, or define its __deepcopy__()"
    return (
        "it keeps results of a computation as attributes, as torch.nn.utils.prune and the old "
        "weight_norm do; after a forward under torch.no_grad() they can be copied"
    )


def check_wide(network: nn.Module, rounding: str | None) -> None:
    reshard((network,))  # what a forward has gathered may be in another dtype
    for name, parameter in network.named_parameters():
        if parameter.dtype in HALVES and rounding is None:
            raise TypeError(
                f"teacher: {name!r} is {parameter.dtype}, expected float32 or float64; in half "
                "precision the average moves only with rounding='stochastic' or 'kahan'"
            )


def retype(network: nn.Module, dtype: torch.dtype | None, rounding: str | None) -> None:
    """Give the parameters the dtype of the teacher's, and widen the buffers of theirs with them."""
    if dtype in HALVES and rounding is None:
        raise ValueError(
            f"dtype: got {dtype}, expected float32 or float64; in half precision the average does "
            "not move, since a step of (1 - decay) is below its rounding, unless rounding= is "
            "'stochastic' or 'kahan'"
        )
    if dtype not in (None, torch.float32, torch.float64, *HALVES):
        raise ValueError(f"dtype: got {dtype}, expected float32, float64, bfloat16 or float16")
    given, kept = {}, _beside_statistics(network) if dtype in HALVES else set()
    for parameter in network.parameters():
        if parameter.is_floating_point() and parameter not in kept:
            widened = parameter.dtype in HALVES and rounding is None
            wanted = dtype or (torch.float32 if widened else parameter.dtype)
            given[parameter.dtype] = wanted
            _convert(parameter, wanted)
    for buffer in network.buffers():  # running statistics: a layer takes one dtype for all it has
        if buffer.dtype in given:
            _convert(buffer, torch.promote_types(buffer.dtype, given[buffer.dtype]))
    if rounding is not None and not any(p.dtype in HALVES for p in network.parameters()):
        raise ValueError(
            f"rounding: got {rounding!r} for a teacher without parameters in half precision; "
            "expected dtype=torch.bfloat16 or torch.float16 with it"
        )


def _convert(tensor: Tensor, dtype: torch.dtype) -> None:
    if not hasattr(tensor, "placements"):
        tensor.data = tensor.data.to(dtype)
    elif tensor.dtype != dtype:  # a DTensor would tell the new dtype, and keep the shard of the old
        converted = tensor.detach().to(dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        converted = nn.Parameter(converted, tensor.requires_grad) if is_parameter else converted
        torch.utils.swap_tensors(tensor, converted)


def _beside_statistics(network: nn.Module) -> set[nn.Parameter]:
    """Parameters of the layers that normalise by running statistics, which take no other dtype."""
    kind = nn.modules.batchnorm._NormBase
    layers = [module for module in network.modules() if isinstance(module, kind)]
    tracking = [layer for layer in layers if layer.running_mean is not None]
    return {parameter for layer in tracking for parameter in layer.parameters()}


@torch.no_grad()
def all_pairs(teacher: nn.Module, student: nn.Module, buffers: str) -> list[Pair]:
    """Each parameter and buffer of the teacher, and the student's of the same name.

    Of kept buffers those that match; a student may have others.
    """
    reshard((teacher, student))
    kept = buffers == "keep"
    return [
        *matched(teacher.named_parameters(), student.named_parameters()),
        *matched(teacher.named_buffers(), student.named_buffers(), partly=kept),
    ]


@torch.no_grad()
def write(pairs: Iterable[Pair]) -> None:
    """The averages into the student."""
    for name, average, value in pairs:
        if value.is_meta:
            raise ValueError(f"network: {name!r} is on the meta device and has no memory")
        _copy(value, average)
    torch.clear_autocast_cache()  # an autocast around this goes on with what it has cast before


def _copy(target: Tensor, value: Tensor) -> None:
    """Also where several elements of the target are one place in memory."""
    if target.layout == torch.strided:
        for dim, step in enumerate(target.stride()):
            if step == 0 and target.shape[dim] > 1:
                target, value = target.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    target.copy_(value)


def carries(network: nn.Module) -> bool:
    """Whether a network, a part of it, or one that it is a part of, carries a teacher's weights."""
    if not carrying:
        return False
    others = {module for other in list(carrying) for module in other.modules()}
    return not others.isdisjoint(network.modules())


@contextlib.contextmanager
def lent(student: nn.Module, teacher: nn.Module, buffers: str) -> Iterator[None]:
    """The student carries a teacher's weights in this context, and its own again after it."""
    with _lending:
        if student in carrying:
            raise RuntimeError("swapped: the student carries a teacher's weights already")
        carrying.add(student)
    try:
        pairs = all_pairs(teacher, student, buffers)
        own = {name: tensor.detach().clone() for name, tensor in _entries(student).items()}
        try:
            write(pairs)
            yield
        finally:
            _put_back(student, own, {plain_name(pair.name, module=True) for pair in pairs})
    finally:
        carrying.discard(student)  # last: another thread would take the teacher's for its own


def _entries(network: nn.Module) -> dict[str, Tensor]:
    """Each parameter and buffer by its name; of sharded ones this process's shard."""
    reshard((network,))
    return {plain_name(name): local(tensor) for name, tensor in _named_tensors(network)}


@torch.no_grad()
def _put_back(student: nn.Module, own: Mapping[str, Tensor], written: Container[str]) -> None:
    """Write the values of `own`, all that have a place yet.

    One of those that were `written` which has none is then named.
    """
    now, lost = _entries(student), []
    for name, value in own.items():
        if name in now and now[name].shape == value.shape:
            _copy(now[name], value)
        elif plain_name(name, module=True) in written:
            lost.append(name)
    torch.clear_autocast_cache()
    if lost:
        raise ValueError(
            f"student: {lost[0]!r} was removed or resized in swapped(), expected it as before; all "
            "that fits is put back"
        )


def follow_mode(network: nn.Module, student: nn.Module) -> None:
    """Give each module of a teacher's network the mode of the student's: some may be frozen."""
    named = unwrapped(student).named_modules()
    modes = {plain_name(name): module.training for name, module in named}
    for name, module in network.named_modules():
        mode = modes.get(plain_name(name), student.training)
        if module.training != mode:  # to set it takes longer
            module.training = mode
