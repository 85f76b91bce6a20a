"""Half precision to float32 and back: NVIDIA GPUs do two in a register without taking them apart.

Left to itself the compiler takes the pairs that it reads apart, and selects what it stores one by
one after rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import cuda_capability_geq, is_cuda

COMPILED = tl.constexpr(not knobs.runtime.interpret)


@triton.jit
def widened(tile):
    """The tile in float32."""
    if COMPILED and is_cuda() and tile.dtype == tl.bfloat16:
        bits = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [tile],
            dtype=tl.int32,
            is_pure=True,
            pack=2,
        )
        return bits.to(tl.float32, bitcast=True)
    else:
        return tile.to(tl.float32)


@triton.jit
def narrowed(tile, active, DTYPE: tl.constexpr):
    """The tile of float32 in DTYPE where active, exactly 0 elsewhere, even of NaN."""
    if COMPILED and cuda_capability_geq(8, 0) and DTYPE.primitive_bitwidth == 16:
        kind: tl.constexpr = "bf16x2" if DTYPE.name == "bf16" else "f16x2"
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 pair; cvt.rn." + kind + ".f32 pair, $2, $1; and.b32 $0, pair, $3; }",
            "=r,r,r,r",
            [tile, tl.where(active, -1, 0).to(tl.int16)[None, :]],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
        return bits.to(DTYPE, bitcast=True)
    else:
        return tl.where(active[None, :], tile, 0.0).to(DTYPE)
