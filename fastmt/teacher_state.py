"""What a teacher saves and loads: the state dict of the plain network, and what rounding lost."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmt.ema_bound import has_arithmetic
from fastmt.matching import local, plain_name, reshard, sharded_as
from fastmt.rounding import HALVES


def add_versions(state: Mapping[str, object], prefix: str) -> None:
    """Tell the versions of the modules by the names that these have in a teacher under `prefix`.

    Some modules load the entries of older versions in another way, and take those of none for old.
    """
    told = getattr(state, "_metadata", {})
    inside = {name[len(prefix) :]: told[name] for name in told if f"{name}.".startswith(prefix)}
    for name, version in inside.items():
        told.setdefault(prefix + _in_teacher(name), version)


def versioned(state: Mapping[str, object], network: nn.Module) -> Mapping[str, object]:
    """A copy with these versions of the state dict of a plain or wrapped network like `network`.

    Of a checkpoint of timm's that has one, the part "state_dict_ema".
    """
    if isinstance(state, Mapping):  # PyTorch names what it is else
        state = state.get("state_dict_ema", state)
    told = getattr(state, "_metadata", None)
    if told is None:
        return state
    own = _own_names((name for name, _ in network.named_modules()), told)
    known = {_in_teacher(own[name]): told[name] for name in own}
    state = OrderedDict(state)
    state._metadata = {**told, **known}
    return state


def _own_names(names: Iterable[str], given: Iterable[str]) -> dict[str, str]:
    """What given names, to which wrappers may have added, are among the names of a network."""
    names, given = list(names), list(given)
    plain = {plain_name(name): name for name in names}
    for start in ("", "module."):  # before all of them are dropped: it may have a child so called
        found = {name: plain.get(plain_name(name).removeprefix(start)) for name in given}
        if None not in found.values():
            return found
    plain = {plain_name(name, module=True): name for name in names}
    found = {name: plain.get(plain_name(name, module=True)) for name in given}
    return {name: own for name, own in found.items() if own is not None}


def _in_teacher(name: str) -> str:
    return f"module.{name}" if name else "module"


class Loading(NamedTuple):
    """What a teacher has to know from before its network loads until it has loaded."""

    prefix: str  # of the teacher's entries
    updates: int | None  # that AveragedModel has counted
    tied: dict[nn.Parameter, list[str]]  # with the names that each has, most of them one

    @classmethod
    def start(cls, network: nn.Module, state: dict[str, object], prefix: str) -> Loading:
        """Give the entries of a plain or wrapped network, in place, the names of the teacher's."""
        names = network.state_dict().keys()
        counted = "n_averaged" not in names
        updates = state.pop(f"{prefix}n_averaged", None) if counted else None
        entries = {full.removeprefix(prefix): entry for full, entry in state.items()}
        own = _own_names(names, entries)
        state.clear()
        for name, entry in entries.items():
            state[f"{prefix}module.{own.get(name, name)}"] = entry
        tied: dict[nn.Parameter, list[str]] = defaultdict(list)
        for name, parameter in network.named_parameters(remove_duplicate=False):
            tied[parameter].append(name)
        return cls(prefix, None if updates is None else int(updates), tied)

    def end(self, network: nn.Module, missing: list[str], unexpected: list[str]) -> bool:
        """Whether a parameter was loaded.

        Names that failed become those of the plain network. What was tied and had a tensor assigned
        is tied again.
        """
        now = dict(network.named_parameters(remove_duplicate=False))
        for parameter, names in self.tied.items():
            names = [name for name in names if name in now]
            assigned = [now[name] for name in names if now[name] is not parameter]
            for name in names if assigned else ():
                path, _, last = name.rpartition(".")
                network.get_submodule(path)._parameters[last] = assigned[-1]
        inside = f"{self.prefix}module."
        found = any(inside + name not in missing for name in now)
        for names in (missing, unexpected):
            names[:] = [
                self.prefix + name.removeprefix(inside) if name.startswith(inside) else name
                for name in names
            ]
        return found


def counts(progress: Mapping[str, object]) -> tuple[int, int]:
    """`calls` and `updates` of a progress()."""
    if not isinstance(progress, Mapping):
        kind = type(progress).__name__
        raise TypeError(f"progress: got {kind}, expected a mapping, as of progress()")
    for name in ("calls", "updates"):
        if name not in progress:
            raise ValueError(f"progress: got no {name!r}, expected one, as of progress()")
    return int(progress["calls"]), int(progress["updates"])


@torch.no_grad()
def whole_compensation(network: nn.Module, lost: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What "kahan" has lost of each parameter, none as yet of most; sharded as the parameters are.

    What loads in place, as distributed checkpoints do, needs a place for all of it.
    """
    reshard((network,))
    named = {plain_name(name): parameter for name, parameter in network.named_parameters()}
    halves = {name: local(p) for name, p in named.items() if p.dtype in HALVES}
    halves = {name: shard for name, shard in halves.items() if has_arithmetic(shard)}
    found = {name: torch.zeros_like(shard) for name, shard in halves.items() if name not in lost}
    return {n: sharded_as(t, named.get(n, t)) for n, t in (found | dict(lost)).items()}
