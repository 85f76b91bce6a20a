"""Which tensors of two networks belong together, and whether that still holds."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmt import arguments, cpp_backend, native
from fastmt.ema_bound import storage_of

# Components that wrappers put into the names of what they wrap.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class Pair(NamedTuple):
    """An average and the student's value of the same name; of sharded tensors the local shards."""

    name: str
    average: Tensor
    value: Tensor


def unwrapped(network: nn.Module, name: str = "student") -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel, torch.compile and Fabric wrappers.

    Raises TypeError with the `name` of the argument where it is no module.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"{name}: got {type(network).__name__}, expected a torch.nn.Module")
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(network, parallel):
            network = network.module
        elif "_orig_mod" in network._modules:
            network = network._modules["_orig_mod"]
        elif "_forward_module" in network._modules:  # of Lightning Fabric
            network = network._modules["_forward_module"]
        else:
            return network


def plain_name(name: str, *, module: bool = False) -> str:
    """`name` without the components of wrappers, and without "module" where asked."""
    dropped = _WRAPPERS | ({"module"} if module else set())
    return ".".join(part for part in name.split(".") if part not in dropped)


def matched(
    teacher: Iterable[tuple[str, Tensor]],
    student: Iterable[tuple[str, Tensor]],
    *,
    partly: bool = False,
) -> list[Pair]:
    """Pairs by name; a missing, extra, resized or otherwise sharded entry is named in an error.

    It is left out instead where they need match only `partly`.
    """
    teacher, student = list(teacher), list(student)
    averages, values = _named(teacher, False), _named(student, False)
    if averages.keys() != values.keys():
        averages, values = _named(teacher, True), _named(student, True)
    pairs = []
    for name in dict.fromkeys((*averages, *values)):
        misfit = _misfit(name, averages.get(name), values.get(name))
        if misfit is None:
            pairs.append(Pair(name, local(averages[name]), local(values[name])))
        elif not partly:
            raise misfit
    return pairs


def _named(tensors: list[tuple[str, Tensor]], module: bool) -> dict[str, Tensor]:
    named = {plain_name(name, module=module): tensor for name, tensor in tensors}
    return named if len(named) == len(tensors) else dict(tensors)


def _misfit(name: str, average: Tensor | None, value: Tensor | None) -> Exception | None:
    """Why two entries of one name do not belong together."""
    if average is None or value is None:
        where = "teacher" if average is None else "student"
        return ValueError(f"student: {name!r} is missing in the {where}; make a new EMATeacher")
    if average.shape != value.shape:
        return ValueError(
            f"student: {name!r} has shape {arguments.shape(value)}, the teacher "
            f"{arguments.shape(average)}; make a new EMATeacher"
        )
    kinds = [(t.is_floating_point(), t.is_complex()) for t in (average, value)]
    if kinds[0] != kinds[1]:
        return TypeError(f"student: {name!r} is {value.dtype}, in the teacher {average.dtype}")
    shards = [getattr(t, "placements", None) for t in (average, value)]
    meshes = [getattr(t, "device_mesh", None) for t in (average, value)]
    if shards[0] != shards[1] or meshes[0] != meshes[1]:
        return ValueError(
            f"student: {name!r} is placed as {shards[1]} on {meshes[1]}, the teacher as "
            f"{shards[0]} on {meshes[0]}; shard both networks alike"
        )
    return None


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor (DTensor), any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "placements") else tensor


def sharded_as(shard: Tensor, tensor: Tensor) -> Tensor:
    """This process's shard as a tensor that is sharded as another is, if that is sharded at all."""
    if not hasattr(tensor, "placements"):
        return shard
    mesh, placements = tensor.device_mesh, tensor.placements
    whole = {"shape": tensor.shape, "stride": tensor.stride()}
    return type(tensor).from_local(shard, mesh, placements, run_check=False, **whole)


def check_memory(pairs: Sequence[Pair]) -> None:
    """An error naming an entry that has no memory yet, none in strides, or shares the teacher's."""
    for name, average, value in pairs:
        for side, tensor in (("student", value), ("teacher", average)):
            if tensor.is_meta:
                raise ValueError(
                    f"{side}: {name!r} is on the meta device and has no memory yet; give it some "
                    "before the first update, as to_empty() does"
                )
            if tensor.layout == torch.strided and tensor.numel() and not storage_of(tensor):
                raise ValueError(f"{side}: the storage of {name!r} was freed, expected its memory")
            if tensor.layout != torch.strided or tensor.is_quantized:
                kind = tensor.dtype if tensor.is_quantized else tensor.layout
                raise TypeError(
                    f"{side}: {name!r} is {kind}, expected a dense tensor; "
                    "buffers='keep' leaves buffers alone"
                )
    storages = {storage_of(p.average) for p in pairs if p.average.numel()}
    for name, _, value in pairs:
        if value.numel() and storage_of(value) in storages:
            raise ValueError(
                f"student: {name!r} shares storage with the teacher; clone one of them"
            )


def reshard(networks: Iterable[nn.Module]) -> None:
    """Put FSDP's parameters back to shards: a forward may have left them gathered."""
    for module in sharded_modules(networks):
        _reshard(module)


def sharded_modules(networks: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that FSDP2 or its forerunner shards."""
    modules = (module for network in networks for module in network.modules())
    fsdp2 = ("reshard", "unshard")
    return [m for m in modules if _is_forerunner(m) or all(hasattr(m, name) for name in fsdp2)]


def _is_forerunner(module: nn.Module) -> bool:
    return "_fsdp_wrapped_module" in module._modules


def _reshard(module: nn.Module) -> None:
    if not _is_forerunner(module):
        module.reshard()
        return
    # FSDP2's forerunner has no name for it. What a forward has gathered, the next one takes again,
    # whatever was written into the shards meanwhile.
    handle = module._handle
    is_idle = module._is_root is not None and module.training_state.name == "IDLE"
    if handle is None or not is_idle or not handle.uses_sharded_strategy:
        return
    if not handle.needs_unshard():
        handle.reshard(free_unsharded_flat_param=True)
        handle._prefetched = False


def is_sharded(network: nn.Module) -> bool:
    """Whether FSDP2 or its forerunner shards any part of it."""
    return bool(sharded_modules([network]))


class Shards:
    """The local shards of networks under FSDP, and whether they lie in the same memory yet.

    A forward gathers the parameters in place of the sharded ones; they are put back first. The
    tensor that stands for a shard is a new one at every look.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        networks = list(networks)
        self._modules = sharded_modules(networks)
        self.reshard()
        tensors = (t for n in networks for t in (*n.parameters(), *n.buffers()))
        self._sharded = [t for t in tensors if hasattr(t, "placements")]
        self.any = bool(self._modules or self._sharded)
        self._seen = self._places()

    def reshard(self) -> None:
        for module in self._modules:
            _reshard(module)

    @torch.no_grad()
    def _places(self) -> list[tuple[object, ...]]:
        shards = map(local, self._sharded)
        return [(shard.data_ptr(), shard.shape, shard.stride(), shard.dtype) for shard in shards]

    def holds(self) -> bool:
        self.reshard()
        return self._seen == self._places()


class Structure:
    """The modules, parameters and buffers of networks, and whether they are the same objects yet.

    The C++ library compares addresses. Without it Python compares the dictionaries, which takes
    longer: equal entries are found by identity; another tensor in the place of one is compared by
    value, which raises for all but one element; and one element of the same value gives the same
    average.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        modules = [module for network in networks for module in network.modules()]
        self._live = [d for m in modules for d in (m._parameters, m._buffers, m._modules)]
        self._seen = [dict(entries) for entries in self._live]
        # All three are others once a module's __init__ has run again. A teacher's own would hold,
        # with its plan, what holds this.
        own = [vars(module) for module in modules]
        self._own = [each for each in own if "_parameters" in each and "_plan" not in each]
        self._held = [each["_parameters"] for each in self._own]
        self._native = None
        if cpp_backend.missing() is None and all(isinstance(e, dict) for e in self._live):
            self._native = native.dictionaries_hold()
            self._addresses = _addresses(self._live, self._seen, self._own)
            self._table, self._next = (
                self._addresses.buffer_info()[0],
                native.address_of("PyDict_Next"),
            )

    def holds(self) -> bool:
        if self._native is not None:
            return self._native(self._table, self._next)
        try:
            held = map(operator.is_, self._held, [own.get("_parameters") for own in self._own])
            return all(held) and self._live == self._seen
        except (RuntimeError, ValueError, TypeError):  # tensors that cannot be compared
            return False


def _addresses(live: Sequence[dict], seen: Sequence[dict], own: Sequence[dict]) -> array[int]:
    """The table that csrc/objects.cpp reads."""
    table = [len(live), *map(id, live)]
    for entries in seen:
        table += [len(entries), *(id(each) for entry in entries.items() for each in entry)]
    table.append(len(own))
    for attributes in own:
        key = next(name for name in attributes if name == "_parameters")  # not interned in all
        table += [id(attributes), id(key), id(attributes[key])]
    return array("q", table)
