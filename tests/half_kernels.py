"""Kernels that only widen or narrow what they are given, for the tests of kernels/halves.py."""

import triton
import triton.language as tl

from fastmt.kernels.halves import narrowed, widened


@triton.jit
def widen_kernel(halves, result, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(result + at, widened(tl.load(halves + at)))


@triton.jit
def narrow_kernel(values, active, result, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    row = tl.load(values + at)[None, :]
    row = narrowed(row, tl.load(active + at) != 0, result.dtype.element_ty)
    tl.store(result + at[None, :], row)
