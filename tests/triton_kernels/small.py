"""Operands small enough for the interpreter, which takes its time for every block of pixels."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from operands import DTYPES, LAYOUTS


def offsets_of(monkeypatch, *modules) -> list[bool]:
    """Grows with each launch of these modules from now on: whether its offsets have 64 bits."""
    # Where there is no Triton, this is not reached.
    from fastmt.kernels.launch import Launch, forget

    wide = []

    class Noting(Launch):
        def __call__(self, *given):
            wide.append(self._constants["WIDE"])
            super().__call__(*given)

    forget()
    for module in modules:
        monkeypatch.setattr(module, "Launch", Noting)
    return wide


def device() -> str:
    """Where a kernel that a test itself launches runs."""
    if os.environ.get("FASTMT_COMPILE_FOR"):
        pytest.skip("what is compiled for a GPU that is not here leaves nothing")
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def left_by(kernel: Any, count: int, *arguments: object, **constants: object) -> list[int]:
    """The whole numbers that one program of a kernel leaves in its first argument."""
    found = torch.zeros(count, dtype=torch.int64, device=device())
    kernel[(1,)](found, *arguments, **constants)
    return found.tolist()


DTYPE = st.sampled_from(DTYPES)
LAYOUT = st.sampled_from(LAYOUTS)
