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
    """(table, PyDict_Next) -> bool, of csrc/objects.cpp; None where Python has no lock."""
    return _comparing("fastmt_dictionaries_hold", 2)


@functools.cache
def list_holds() -> ctypes._CFuncPtr | None:
    """(list, addresses, number of them, PyList_GetItem) -> bool; None alike."""
    return _comparing("fastmt_list_holds", 4)


def address_of(name: str) -> int:
    """Of a function of Python's C API."""
    return ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value


@functools.cache
def ema_holds() -> ctypes._CFuncPtr:
    """(key) -> bool, of csrc/cpu/ema_bound.cpp; no other thread of Python runs during it."""
    return _declared(_keeping_the_lock(), "fastmt_ema_holds", 1)


@functools.cache
def ema_run() -> ctypes._CFuncPtr:
    """(key, decays, draws) -> bool, of csrc/cpu/ema_bound.cpp."""
    return _declared(ctypes.CDLL(str(cpp_backend.library_path())), "fastmt_ema_run", 3)


@functools.cache
def ema_layouts_hold() -> ctypes._CFuncPtr:
    """(key) -> bool, of csrc/cpu/ema_layouts.cpp; no other thread of Python runs during it."""
    return _declared(_keeping_the_lock(), "fastmt_ema_layouts_hold", 1)


def _comparing(name: str, arguments: int) -> ctypes._CFuncPtr | None:
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    return _declared(_keeping_the_lock(), name, arguments)


def _keeping_the_lock() -> ctypes.PyDLL:
    return ctypes.PyDLL(str(cpp_backend.library_path()))


def _declared(library: ctypes.CDLL, name: str, arguments: int) -> ctypes._CFuncPtr:
    function = getattr(library, name)
    function.argtypes, function.restype = [ctypes.c_void_p] * arguments, ctypes.c_bool
    return function
