"""Lines and volumes as planes, the images that the kernels up-sample.

A line is a plane of one row. A volume is one plane a slice, once its depth has been interpolated,
which takes place at the low resolution of the planes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmt import backends, gradients, triton_backend
from fastmt import slices as of_torch


def plane_size(logits: Sequence[Tensor], size: Sequence[int] | None) -> list[int] | None:
    """What the kernels up-sample planes to; None where all logits come to them at that size."""
    if size is None or _have_size(logits, size):
        return None
    plane = list(size[-2:]) if len(size) > 1 else [1, *size]
    has_planes = len(size) == 3 and all(list(member.shape[3:]) == plane for member in logits)
    return None if has_planes else plane


def logits_of_planes(
    logits: Sequence[Tensor], size: Sequence[int] | None, align_corners: bool, backend: str
) -> list[Tensor]:
    """Logits (N, C, *spatial) that are to be up-sampled to `size`, those of planes (N', C, H, W).

    Differentiable. All others come back as they are; those whose depth is interpolated are float32.
    """
    if size is None or logits[0].ndim == 4 or _have_size(logits, size):
        return list(logits)
    if len(size) == 1:
        return [member.unsqueeze(2) for member in logits]
    how = (size[0], bool(align_corners), backend)
    return [_resampled(member.movedim(2, 1), *how).flatten(0, 1) for member in logits]


def _resampled(slices: Tensor, out: int, align_corners: bool, backend: str) -> Tensor:
    if slices.shape[1] == out:
        return slices
    if backend == "cpp" and slices.is_cpu:
        return _Resampled.apply(slices.contiguous().float(), "cpp", out, align_corners)
    if triton_backend.obstacle("resample_slices", [slices]):  # beside CUDA C++ kernels
        return of_torch.resample_slices(slices.float(), out, align_corners)
    return _Resampled.apply(slices, "triton", out, align_corners)


def map_of_planes(pixels: Tensor | None, logits: Tensor) -> Tensor | None:
    """A map (N, *out) of the pixels of what logits_of_planes made of its logits."""
    if pixels is None or pixels.ndim == logits.ndim - 1:
        return pixels
    return pixels.unsqueeze(1) if pixels.ndim == 2 else pixels.flatten(0, 1)


def _have_size(logits: Sequence[Tensor], size: Sequence[int]) -> bool:
    return all(tuple(member.shape[2:]) == tuple(size) for member in logits)


class _Resampled(torch.autograd.Function):
    """Slices (N, D, C, H, W) as (N, out, C, H, W)."""

    @staticmethod
    def forward(ctx, slices, backend, out, align_corners):
        ctx.backend, ctx.align_corners = backend, align_corners
        ctx.depth, ctx.dtype = slices.shape[1], slices.dtype
        return backends.operations(backend).resample_slices(slices, out, align_corners)

    @staticmethod
    def backward(ctx, gradient):
        traced = torch.compiler.is_compiling()
        kernels = backends.operations(ctx.backend)
        if ctx.backend == "triton" and not traced and gradients.is_batched(gradient):
            kernels = triton_backend.nodes()
        call = (gradient.contiguous(), ctx.depth, ctx.align_corners)
        with torch.no_grad():
            slices = kernels.resample_slices_backward(*call).to(ctx.dtype)
        if torch.is_grad_enabled() and not traced:  # create_graph=True
            slices = gradients.DifferentiableOnce.apply(slices, gradient)
        return slices, None, None, None
