"""The versions that a state dict tells of its modules, by the names that they have in a teacher.

Some modules load the entries of older versions in another way, and take those of none for old.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import nn

from fastmt.matching import plain_name


def add_versions(state: Mapping[str, object], prefix: str) -> None:
    """Add them to what the averaged network has written of itself under `prefix`."""
    told = getattr(state, "_metadata", {})
    inside = {name[len(prefix) :]: told[name] for name in told if f"{name}.".startswith(prefix)}
    for name, version in inside.items():
        told.setdefault(prefix + _in_teacher(name), version)


def versioned(state: Mapping[str, object], network: nn.Module) -> Mapping[str, object]:
    """A copy with them of the state dict of a plain or wrapped network like `network`."""
    told = getattr(state, "_metadata", None)
    if told is None:
        return state
    own = {plain_name(name, module=True): name for name, _ in network.named_modules()}
    plain = {plain_name(name, module=True): version for name, version in told.items()}
    known = {_in_teacher(own[name]): plain[name] for name in plain if name in own}
    state = OrderedDict(state)
    state._metadata = {**told, **known}
    return state


def _in_teacher(name: str) -> str:
    return f"module.{name}" if name else "module"
