"""Half precision as bits, to the nearest and at random. Mirrors csrc/cuda/rounding.h."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mixed(x):
    """Wellons' lowbias32 of uint32: each bit of the result depends on each of x."""
    x = (x ^ x >> 16) * 0x7FEB352D
    x = (x ^ x >> 15) * 0x846CA68B
    return x ^ x >> 16


@triton.jit
def widened(bits, is_bfloat16):
    """uint16 bits -> float32; of bfloat16, or else of float16."""
    wide = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return tl.where(is_bfloat16, wide, bits.to(tl.float16, bitcast=True).to(tl.float32))


@triton.jit
def nearest(x, is_bfloat16):
    """float32 -> the bits of the nearest value."""
    bfloat16 = x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    return tl.where(is_bfloat16, bfloat16, x.to(tl.float16).to(tl.uint16, bitcast=True))


@triton.jit
def at_random(x, is_bfloat16, random):
    """float32 -> the bits of the value below or above, by uint32 that leave the mean at x."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bfloat16 = tl.where(magnitude > 0x7F800000, 0x7FC0, (bits + (random & 0xFFFF)) >> 16)
    normal = (magnitude + (random & 0x1FFF) - 0x38000000) >> 13
    small = magnitude < 0x38800000
    steps = tl.where(small, tl.abs(x) * 16777216.0, 0.0)  # of 2^-24, the subnormal numbers
    whole = steps.to(tl.int32)
    up = (random >> 8).to(tl.float32) < (steps - whole.to(tl.float32)) * 16777216.0
    special = tl.where(magnitude > 0x7F800000, 0x7E00, 0x7C00)
    float16 = tl.where(small, (whole + up.to(tl.int32)).to(tl.uint32), normal)
    float16 = tl.where(magnitude >= 0x47800000, special, float16) | (bits >> 16 & 0x8000)
    return tl.where(is_bfloat16, bfloat16, float16).to(tl.uint16)
