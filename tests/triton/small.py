"""Operands small enough for the interpreter, which takes a tenth of a second a block of pixels."""

from __future__ import annotations

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


DTYPE = st.sampled_from(DTYPES)
LAYOUT = st.sampled_from(LAYOUTS)
