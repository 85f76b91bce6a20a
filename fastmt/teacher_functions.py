"""What deepcopy passes on as it is, and by which a teacher would run its student's weights."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Container, Iterator

from torch import nn

_OF_ALL = vars(nn.Module()).keys()


def check_functions(network: nn.Module, twin: nn.Module) -> None:
    """Refuse a student whose copy would run the student's own weights."""
    modules = set(network.modules())
    twins = dict(twin.named_modules())
    for name, module in network.named_modules():
        passed_on = {(place, id(kept)) for place, _, kept in _kept(twins[name])}
        for place, verb, kept in _kept(module):
            if (place, id(kept)) in passed_on and _holds(kept, modules):
                kind = "function" if inspect.isfunction(kept) else "weak reference"
                raise TypeError(
                    f"student: the {place} of {name or type(module).__name__!r} {verb} a {kind} "
                    "that refers to the student itself, and so would a copy's; make the teacher "
                    "before it is set, or set a method; a module is compiled by its compile()"
                )


def _kept(module: nn.Module) -> list[tuple[str, str, object]]:
    """What a forward may use beside methods: of attributes, such as a `forward`, and of hooks."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    own = ((name, held) for name, held in vars(module).items() if name not in _OF_ALL)
    named = (*own, *(("forward hook", hook) for hook in hooks))
    return [
        (name, "is" if kept is held else "holds", kept)
        for name, held in named
        for kept in _passed_on(held)
    ]


def _passed_on(held: object) -> Iterator[object]:
    """Functions and weak references to modules, also in what deepcopy does make copies of."""
    waiting, seen = [held], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, functools.partial):
            waiting += (each.func, *each.args, *each.keywords.values())
        elif isinstance(each, (list, tuple)):
            waiting += each
        elif isinstance(each, dict):
            waiting += each.values()
        elif inspect.isfunction(each) or _module_of(each) is not None:
            yield each


def _module_of(reference: object) -> nn.Module | None:
    """What a weak reference refers to, where that is a module."""
    referent = reference() if isinstance(reference, weakref.ref) else None
    return referent if isinstance(referent, nn.Module) else None


def _holds(kept: object, modules: Container[nn.Module]) -> bool:
    """Whether a function, or one that it closes over, refers to a module or to its method."""
    if not inspect.isfunction(kept):
        return _module_of(kept) in modules
    waiting, seen = [kept], set()
    while waiting:
        inner = waiting.pop()
        if not inspect.isfunction(inner) or inner in seen:
            continue
        seen.add(inner)
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            scope = inspect.getclosurevars(inner)
            for value in (*scope.nonlocals.values(), *scope.globals.values()):
                held = getattr(value, "__self__", value), _module_of(value)
                if any(isinstance(each, nn.Module) and each in modules for each in held):
                    return True
            waiting += scope.nonlocals.values()
    return False
