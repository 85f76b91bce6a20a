"""Functions of the C++ library that are called past PyTorch's dispatcher.

They take addresses and numbers, no tensors, and less time than the dispatcher does. Whoever calls
them has seen that the library is there (`cpp_backend.missing`).
"""

from __future__ import annotations

import ctypes
import functools
import sys

from fastmt import cpp_backend


@functools.cache
def dictionaries_hold() -> ctypes._CFuncPtr | None:
    """(table, PyDict_Next) -> bool, of csrc/dictionaries.cpp; None where Python has no lock."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    return _declared(_keeping_the_lock(), "fastmt_dictionaries_hold", 2)


def next_entry() -> int:
    """The address of PyDict_Next."""
    return ctypes.cast(ctypes.pythonapi.PyDict_Next, ctypes.c_void_p).value


@functools.cache
def ema_holds() -> ctypes._CFuncPtr:
    """(key) -> bool, of csrc/cpu/ema_bound.cpp; no other thread of Python runs during it."""
    return _declared(_keeping_the_lock(), "fastmt_ema_holds", 1)


@functools.cache
def ema_run() -> ctypes._CFuncPtr:
    """(key, decays, draws) -> bool, of csrc/cpu/ema_bound.cpp."""
    return _declared(ctypes.CDLL(str(cpp_backend.library_path())), "fastmt_ema_run", 3)


def _keeping_the_lock() -> ctypes.PyDLL:
    return ctypes.PyDLL(str(cpp_backend.library_path()))


def _declared(library: ctypes.CDLL, name: str, arguments: int) -> ctypes._CFuncPtr:
    function = getattr(library, name)
    function.argtypes, function.restype = [ctypes.c_void_p] * arguments, ctypes.c_bool
    return function
