"""Slices of volumes, interpolated along their depth by PyTorch, for a GPU without Triton."""

from __future__ import annotations

import torch
from torch import Tensor


def resample_slices(slices: Tensor, out: int, align_corners: bool) -> Tensor:
    """(N, D, ...) -> (N, out, ...), differentiable.

    They are indexed, not selected: PyTorch adds up the gradient of index_select on a GPU in
    whatever order the threads come.
    """
    last = slices.shape[1] - 1
    z = torch.arange(out, device=slices.device)
    unit = max(out - 1, 1) if align_corners else 2 * out
    place = z * last if align_corners else (2 * z + 1) * (last + 1) - out
    place = place.clamp(0, last * unit)  # in whole numbers: one that falls on a slice has t = 0
    before = place.div(unit, rounding_mode="floor")
    t = ((place - before * unit).double() / unit).to(slices.dtype)
    t = t.view(-1, *[1] * (slices.ndim - 2))
    near, far = slices[:, before], slices[:, (before + 1).clamp(max=last)]
    return torch.where(t == 0, near, (1 - t) * near + t * far)
