"""Launches every kernel by Triton's dispatcher and by launch.py: both tell the driver the same.

For a process in which the stub of benchmarks/stub_gpu is preloaded. Prints for each kernel how many
launches passed the dispatcher by, and how many there were, all of them the same to the driver.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from fastmt import kernels
from fastmt.kernels import launch as launching
from fastmt.kernels.ema import COLUMNS

STREAM = 0x70
HEAD = 8 * 4 + 2 * 8  # bytes that driver.cpp keeps of a launch before what the kernel takes

driver = ctypes.CDLL(None)
compared: Counter[str] = Counter()
direct: Counter[str] = Counter()
dispatched: list[str] = []
run, call = triton.JITFunction.run, launching.Launch.__call__


def run_noted(self, *arguments, **options):
    dispatched.append(self.__name__)
    return run(self, *arguments, **options)


def taken() -> bytes:
    room = ctypes.create_string_buffer(1 << 16)
    written = driver.take(room, len(room))
    return room.raw[:written]


def parameters(ptx: str) -> list[int]:
    """Bytes of each of a kernel's parameters."""
    head = ptx[ptx.index(".entry") : ptx.index("{")]
    return [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", head)]


def compare(kernel: Any, programs: int, arguments: Sequence, own: Callable, **options: Any) -> None:
    """One launch by the dispatcher, two by `own`; all have to tell the driver the same."""
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True, **options}
    options.pop("registers", None)  # the stub says that no kernel takes any
    driver.expect(0, None)
    made = kernel[(programs,)](*arguments, **options)
    sizes = parameters(made.asm["ptx"])
    driver.expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
    taken()
    kernel[(programs,)](*arguments, **options)
    expected, before = taken(), len(dispatched)
    own()
    own()
    actual, name = taken(), kernel.__name__
    assert len(expected) == HEAD + sum(sizes), (name, len(expected), sizes)
    assert expected[32:40] == STREAM.to_bytes(8, sys.byteorder), name
    assert actual == 2 * expected, (name, expected.hex(" ", 4), actual.hex(" ", 4))
    compared[name] += 1
    direct[name] += len(dispatched) == before


def compared_call(self, *given):
    arguments = self._order((*given, *self._known))[: self._count]
    compare(self._kernel, self._programs, arguments, lambda: call(self, *given), **self._constants)


def calls() -> None:
    """Each operation, with every kind of argument that its kernels take."""
    z, y = torch.randn(2, 1, 5, 8, 8)
    options = [0, 0, 0, 0, 0, 0]
    for size in (None, [16, 16]):
        out = (1, *(size or (8, 8)))
        weight, valid = torch.rand(out), torch.ones(out, dtype=torch.bool)
        labels, by_class = torch.zeros(out, dtype=torch.uint8), torch.rand(5)
        rest = (options, 0.5, size, False, True)
        kernels.consistency_loss(z, [y], 0.5, None, None, *rest)
        kernels.consistency_loss(z, [y, z], torch.rand(1), weight, None, *rest)
        kernels.consistency_loss(z.bfloat16(), [y], torch.rand(5), None, valid, *rest)
        kernels.softmax_confidence([z, y.half()], 0, 0.5, size, False)
        kernels.cross_entropy(z, labels, None, None, [255, 1], 0.0, False, True)
        kernels.cross_entropy(z, labels, weight, by_class, [255, 1], 0.1, False, True)
    many = torch.zeros(1, 5, 2048, 2048)  # of more programs than one adds up
    kernels.cross_entropy(many, many[:, 0].byte(), None, None, [255, 1], 0.0, False, True)
    kernels.resample_slices(torch.randn(1, 3, 4, 8, 8), 8, False)
    kernels.resample_slices_backward(torch.randn(1, 8, 3, 8, 8), 4, False)
    kernels.scale_(z, torch.tensor(0.5), torch.tensor(0.5))
    table, starts = torch.zeros(1, COLUMNS, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    decay, draws = torch.tensor([0.9], dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    kernels.ema_update_(table, starts, decay)
    kernels.ema_update_(table, starts, decay, draws)


def main() -> None:
    # Of the device the driver is a stub, and PyTorch may know of none.
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch._C._cuda_getCurrentRawStream = lambda device: STREAM
    triton.JITFunction.run = run_noted
    launching.Launch.__call__ = compared_call
    calls()
    compared.clear()
    direct.clear()
    calls()  # all of which is known now
    print(json.dumps({name: [direct[name], compared[name]] for name in compared}))


if __name__ == "__main__":
    main()
