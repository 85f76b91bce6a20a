"""Slices of volumes, interpolated along their depth: one launch, and one for the gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmt.kernels.grid import axis_of, first_beyond, neighbours, share_of
from fastmt.kernels.launch import GIVEN, Launch, layout_of, prepared
from fastmt.kernels.views import describe, device_of, pixels_at, place_of

BLOCK = 1024  # pixels of a slice that a program makes: 16 bytes a thread in half precision too


@triton.jit
def block_of(depth, sizes, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The slice of this program, where its block begins, lanes (64-bit if WIDE), which there are.

    Programs that follow each other are at the same pixels, of which they share what they read.
    """
    place = place_of(tl.program_id(0) // depth, sizes, BLOCK)
    lanes = tl.arange(0, BLOCK)
    inside = place[3] + lanes < sizes[3]
    k = (tl.program_id(0) % depth).to(tl.int64)
    return k, place, lanes.to(tl.int64) if WIDE else lanes, inside


@triton.jit
def load_slice(data, strides, place, lanes, k, mask):
    """The pixels of a block in slice k, in float32; 0 where masked."""
    at = pixels_at(data, strides, place, lanes) + k * strides[0]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_slice(data, strides, place, lanes, k, value, mask):
    tl.store(pixels_at(data, strides, place, lanes) + k * strides[0], value, mask=mask)


@triton.jit
def slices_fwd_kernel(
    slices, resampled, sizes, strides, axis, out, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """An output slice takes the slices around it; of the next nothing where it falls on one."""
    z, place, lanes, inside = block_of(out, sizes, BLOCK, WIDE)
    before, t = neighbours(z, axis)
    near = load_slice(slices, strides[0], place, lanes, before, inside)
    taken = tl.where(t != 0, inside, False)
    far = load_slice(slices, strides[0], place, lanes, before + 1, taken)
    value = (1.0 - t) * near + t * far
    store_slice(resampled, strides[1], place, lanes, z, value, inside)


@triton.jit
def slices_bwd_kernel(
    gradient, result, sizes, strides, axis, out, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """An input slice is given back to by those that took of it, in their order."""
    k, place, lanes, inside = block_of(axis[0], sizes, BLOCK, WIDE)
    value = tl.zeros((BLOCK,), tl.float32)
    first = first_beyond(k - 1, axis, out)
    for j in range(first_beyond(k + 1, axis, out) - first):
        z = first + j
        before, t = neighbours(z, axis)
        share = share_of(k, before, before + 1, t)
        taken = tl.where(share != 0, inside, False)
        value += share * load_slice(gradient, strides[0], place, lanes, z, taken)
    store_slice(result, strides[1], place, lanes, k, value, inside)


def resample_slices(slices: Tensor, out: int, align_corners: bool) -> Tensor:
    """(N, D, ...) -> (N, out, ...), float32 and contiguous."""
    return _resampled(slices_fwd_kernel, slices, out, align_corners)


def resample_slices_backward(gradient: Tensor, depth: int, align_corners: bool) -> Tensor:
    """The gradient (N, out, ...) of what resample_slices returned -> that of its slices."""
    return _resampled(slices_bwd_kernel, gradient, depth, align_corners)


def _resampled(kernel: Any, slices: Tensor, depth: int, align_corners: bool) -> Tensor:
    slices = slices.resolve_neg()  # may be a view that negates its memory
    shape = (slices.shape[0], depth, *slices.shape[2:])
    result = slices.new_empty(shape, dtype=torch.float32)
    if result.numel():
        key = (kernel.fn, depth, align_corners, layout_of(slices))
        with device_of(slices):
            launch = prepared(key, _launch, kernel, slices, result, align_corners)
            launch(slices, result)
    return result


def _launch(kernel: Any, slices: Tensor, result: Tensor, align_corners: bool) -> Launch:
    size, out = slices.shape[1], result.shape[1]
    if kernel is slices_bwd_kernel:
        size, out = out, size
    pixels = describe([slices, result], (), BLOCK)
    return Launch(
        kernel,
        pixels.blocks * result.shape[1],
        GIVEN,
        GIVEN,
        pixels.sizes,
        pixels.strides,
        axis_of(size, out, align_corners),
        out,
        BLOCK=BLOCK,
        WIDE=pixels.wide,
    )
