"""Stochastic rounding to half precision, and the random bits that it goes by."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


def random_bits(like: Tensor, draw: int | Tensor, number: int) -> Tensor:
    """32 random bits, as int64, for each element of a tensor of this number.

    An element goes by its place in memory, in which the kernels walk it.
    """
    if isinstance(draw, Tensor):  # of a student on several GPUs it lies on one
        draw = draw.to(like.device)
    index = torch.arange(like.numel(), device=like.device)
    if like.is_contiguous():
        index = index.view(like.shape)
    else:
        index = index.as_strided(like.shape, torch.empty_like(like, device="meta").stride())
    return mixed(mixed(index & 0xFFFFFFFF) ^ mixed(draw ^ mixed(number)) ^ index >> 32)


def mixed(x: int | Tensor) -> int | Tensor:
    """Wellons' lowbias32 of numbers below 2^32: each bit of the result depends on each of x."""
    x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ x >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ x >> 16


def stochastically_rounded(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """float32 values that `dtype` holds, above or below x, of mean x where `random` is uniform."""
    dropped = 16 if dtype == torch.bfloat16 else 13  # bits of float32's mantissa
    bits = x.view(torch.int32).long() + (random & ((1 << dropped) - 1))
    rounded = (bits >> dropped << dropped).int().view(torch.float32)
    if dtype == torch.float16:
        steps = x.abs() * 2.0**24  # of the subnormal numbers
        steps = steps.floor() + ((random >> 8) * 2.0**-24 < steps.frac())
        rounded = torch.where(x.abs() < 2.0**-14, (steps * 2.0**-24).copysign(x), rounded)
    return torch.where(x.isfinite(), rounded, x)
