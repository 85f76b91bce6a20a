"""Environment variables that are read at every call."""

from __future__ import annotations

import os

import torch


class Variable:
    """One that may be set or unset at any time.

    os.environ itself raises and catches an error where a variable is not set, which takes longer
    than all checks of a call; so what it keeps is asked, except while a graph is traced.
    """

    def __init__(self, name: str) -> None:
        self._name, self._key = name, os.environ.encodekey(name)

    def value(self) -> str | None:
        kept = getattr(os.environ, "_data", None)
        if kept is None or torch.compiler.is_compiling():
            return os.environ.get(self._name)
        found = kept.get(self._key)
        return None if found is None else os.environ.decodevalue(found)
