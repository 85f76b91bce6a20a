"""Slices of volumes, interpolated along their depth on any device. Mirrors csrc/cpu/slices.cpp."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class _Places(NamedTuple):
    """Places of output slices z among input slices: (step * z + first) / unit, in whole numbers.

    A slice that falls on another takes nothing of its neighbours, whatever they hold.
    """

    step: int
    first: int
    unit: int
    last: int  # place of the last slice, in units

    @classmethod
    def of(cls, depth: int, out: int, align_corners: bool) -> _Places:
        if align_corners:
            unit = max(out - 1, 1)
            return cls(depth - 1 if out > 1 else 0, 0, unit, (depth - 1) * unit)
        return cls(2 * depth, depth - out, 2 * out, (depth - 1) * 2 * out)

    def place(self, z: Tensor) -> Tensor:
        return (self.step * z + self.first).clamp(0, self.last)

    def share(self, z: Tensor, k: Tensor) -> Tensor:
        """What output slice z takes of input slice k."""
        reach = (self.place(z) - k * self.unit).abs().double()
        return (1 - reach / self.unit).clamp(min=0).float()

    def takers(self, k: Tensor, out: int) -> Tensor:
        """Output slices (K, most) of which some take something of each input slice k."""
        if self.step == 0:
            return torch.arange(out, device=k.device).expand(len(k), out)
        past = ((k - 1) * self.unit - self.first).div(self.step, rounding_mode="floor")
        most = min(out, -(-2 * self.unit // self.step))
        return (past + 1).clamp(min=0)[:, None] + torch.arange(most, device=k.device)


def resample_slices(slices: Tensor, out: int, align_corners: bool) -> Tensor:
    """(N, D, ...) -> (N, out, ...), contiguous."""
    places = _Places.of(slices.shape[1], out, align_corners)
    z = torch.arange(out, device=slices.device)
    lower = places.place(z).div(places.unit, rounding_mode="floor")
    share = _of_slices(places.share(z, lower), slices)
    near = slices.index_select(1, lower)
    far = slices.index_select(1, (lower + 1).clamp(max=slices.shape[1] - 1))
    return torch.where(share == 1, near, (near * share).addcmul(far, 1 - share))


def resample_slices_backward(gradient: Tensor, depth: int, align_corners: bool) -> Tensor:
    """The gradient of what resample_slices returned -> that of its slices (N, depth, ...).

    PyTorch's own adds up on a GPU in whatever order the threads come.
    """
    out = gradient.shape[1]
    places = _Places.of(depth, out, align_corners)
    k = torch.arange(depth, device=gradient.device)
    takers = places.takers(k, out)
    share = places.share(takers, k[:, None]).where(takers < out, 0)
    shares = _of_slices(share.flatten(), gradient)
    taken = gradient.index_select(1, takers.clamp(max=out - 1).flatten())
    return torch.where(shares == 0, 0, taken * shares).unflatten(1, share.shape).sum(2)


def _of_slices(share: Tensor, slices: Tensor) -> Tensor:
    return share.view(-1, *[1] * (slices.ndim - 2))
