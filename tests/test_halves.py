"""What the compiler makes of kernels/halves.py for a GPU, worked out here line by line."""

from __future__ import annotations

import re

import pytest
import torch

triton = pytest.importorskip("triton")

from half_kernels import narrow_kernel, widen_kernel  # noqa: E402  where Triton is
from operands import HALVES  # noqa: E402
from test_aot import same_compiler  # noqa: E402

from benchmarks import aot  # noqa: E402

pytestmark = same_compiler  # others may say it in other instructions
LOADS = re.compile(r"ld\.global(?:\.v\d)?\.b32 \{ (.*?) \}")
STORE = re.compile(r"st\.global\.v\d\.b32 .*\{ (.*?) \}")


def ptx_of(kernel, *tensors):
    with aot.compiling("sm_90") as launches:
        kernel[(1,)](*tensors, COUNT=128, num_warps=1)
    return launches[0].compiled.asm["ptx"]


def bits(value: float) -> int:
    return torch.tensor(value).view(torch.int32).item() & 0xFFFFFFFF


def run(ptx: str, given: list[list[int]]) -> list[int]:
    """What a thread stores, from what each of its loads gives it; addresses are left out."""
    registers: dict[str, int] = {}
    for names, values in zip(LOADS.findall(ptx), given, strict=True):
        registers |= dict(zip(names.split(", "), values, strict=True))
    code = ptx[list(LOADS.finditer(ptx))[-1].end() :].split("st.global")[0]
    for statement in re.split("[;\n]", code):
        if found := re.match(r"\s*([a-z]+\.[\w.]+)\s+(.*)", statement):
            to, *names = re.findall(r"%\w+|pair|-?\w+", found[2])
            if all(name in registers or name[0] in "-0123456789" for name in names):
                values = [registers[n] if n in registers else int(n.rstrip("U"), 0) for n in names]
                registers[to] = worked_out(found[1], values)
    return [registers[name] for name in STORE.search(ptx)[1].split(", ")]


def worked_out(operation: str, values: list[int]) -> int:
    if operation == "shl.b32":
        return values[0] << values[1] & 0xFFFFFFFF
    if operation == "and.b32":
        return values[0] & values[1]
    if operation == "prmt.b32":  # one byte, and zeros above it
        return values[0] >> 8 * (values[2] & 7) & 0xFF
    if operation == "setp.ne.b32":
        return int(values[0] != values[1])
    if operation == "selp.b16":
        return (values[0] if values[2] else values[1]) & 0xFFFF
    if operation == "mov.b32":
        return values[0] | values[1] << 16
    dtype = {"cvt.rn.bf16x2.f32": torch.bfloat16, "cvt.rn.f16x2.f32": torch.float16}[operation]
    pair = torch.tensor(values, dtype=torch.int64).to(torch.int32).view(torch.float32).to(dtype)
    upper, lower = (value & 0xFFFF for value in pair.view(torch.int16).tolist())
    return upper << 16 | lower


def test_pairs_of_bfloat16_are_widened_in_their_order():
    halves = torch.tensor([1.5, -2.0, torch.inf, 1e-40]).bfloat16()
    ptx = ptx_of(widen_kernel, aot.meta(128, dtype=torch.bfloat16), aot.meta(128))
    pairs = [pair & 0xFFFFFFFF for pair in halves.view(torch.int32).tolist()]
    assert run(ptx, [pairs]) == [bits(value) for value in halves.float().tolist()]


@pytest.mark.parametrize("active", [[1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 1, 1]])
@pytest.mark.parametrize("dtype", HALVES)
def test_pairs_are_narrowed_in_their_order_and_0_where_not_active(dtype, active):
    values = torch.tensor([1.2345, -7.6543e-3, torch.nan, 3e38])
    ptx = ptx_of(
        narrow_kernel, aot.meta(128), aot.meta(128, dtype=torch.uint8), aot.meta(128, dtype=dtype)
    )
    masks = sum(a << 8 * i for i, a in enumerate(active))
    stored = run(ptx, [[bits(v) for v in values.tolist()], [masks]])
    expected = torch.where(torch.tensor(active) != 0, values, 0).to(dtype)
    found = torch.tensor(stored, dtype=torch.int64).to(torch.int32).view(dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
