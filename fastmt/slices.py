"""Slices of volumes, interpolated along their depth on any device, as by csrc/cpu/slices.cpp."""

from __future__ import annotations

import torch
from torch import Tensor


def resample_slices(slices: Tensor, out: int, align_corners: bool) -> Tensor:
    """(N, D, ...) -> (N, out, ...), contiguous."""
    depth = slices.shape[1]
    places, unit = _places(depth, out, align_corners, slices.device)
    lower = places.div(unit, rounding_mode="floor")
    share = _of_slices(_share(places, lower, unit), slices)
    near = slices.index_select(1, lower)
    far = slices.index_select(1, (lower + 1).clamp(max=depth - 1))
    return torch.where(share == 1, near, (near * share).addcmul(far, 1 - share))


def resample_slices_backward(gradient: Tensor, depth: int, align_corners: bool) -> Tensor:
    """The gradient of what resample_slices returned -> that of its slices (N, depth, ...).

    PyTorch's own adds up on a GPU in whatever order the threads come.
    """
    out = gradient.shape[1]
    places, unit = _places(depth, out, align_corners, gradient.device)
    k = torch.arange(depth, device=gradient.device)
    first = torch.searchsorted(places, (k - 1) * unit, right=True)  # that takes something of k
    z = first[:, None] + torch.arange(_most_takers(depth, out, align_corners), device=k.device)
    within, z = z < out, z.clamp(max=out - 1)
    share = _share(places[z], k[:, None], unit).where(within, 0)
    shares = _of_slices(share.flatten(), gradient)
    taken = gradient.index_select(1, z.flatten())
    return torch.where(shares == 0, 0, taken * shares).unflatten(1, share.shape).sum(2)


def _places(depth: int, out: int, align_corners: bool, device: torch.device) -> tuple[Tensor, int]:
    """Where each output slice lies among input slices, in whole numbers, and how many are one.

    A slice that falls on another takes nothing of its neighbours, whatever they hold.
    """
    z = torch.arange(out, device=device)
    unit = max(out - 1, 1) if align_corners else 2 * out
    places = z * (depth - 1) if align_corners else (2 * z + 1) * depth - out
    return places.clamp(0, (depth - 1) * unit), unit


def _share(place: Tensor, k: Tensor, unit: int) -> Tensor:
    """What the output slice at a place takes of input slice k."""
    return (1 - (place - k * unit).abs().double() / unit).clamp(min=0).float()


def _most_takers(depth: int, out: int, align_corners: bool) -> int:
    """Of one input slice: of those that lie less than one input slice away from it."""
    if depth == 1:
        return out
    steps = (out - 1, depth - 1) if align_corners else (out, depth)
    return min(out, max(-(-2 * steps[0] // steps[1]), 1))


def _of_slices(share: Tensor, slices: Tensor) -> Tensor:
    return share.view(-1, *[1] * (slices.ndim - 2))
