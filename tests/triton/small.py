"""Operands small enough for the interpreter, which takes a tenth of a second a block of pixels."""

from __future__ import annotations

from hypothesis import strategies as st
from operands import DTYPES, LAYOUTS


def shapes(classes: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, ...]]:
    """(N, C) to (N, C, D, H, W) with at most a few blocks of pixels."""
    sides = [
        st.just(()),
        st.tuples(st.integers(1, 300)),
        *(st.tuples(*[st.integers(1, s)] * d) for d, s in ((2, 5), (3, 3))),
    ]
    batch = st.integers(1, 2)
    return st.tuples(batch, classes, st.one_of(sides)).map(lambda s: (*s[:2], *s[2]))


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


CLASSES = st.integers(1, 40) | st.integers(41, 200)
DTYPE = st.sampled_from(DTYPES)
LAYOUT = st.sampled_from(LAYOUTS)
