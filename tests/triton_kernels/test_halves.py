"""Half precision read and stored by kernels: what PyTorch's own conversion gives, to the bit."""

from __future__ import annotations

import pytest
import torch
from half_kernels import narrow_kernel, widen_kernel
from operands import HALVES
from small import device

pytestmark = pytest.mark.usefixtures("kernels")
EVERY = torch.arange(-(2**15), 2**15).to(torch.int16)


def same_bits(own: torch.Tensor, right: torch.Tensor) -> bool:
    bits = torch.int32 if own.dtype == torch.float32 else torch.int16
    numbers = [tensor.nan_to_num(0.0, torch.inf, -torch.inf).view(bits) for tensor in (own, right)]
    return torch.equal(own.isnan(), right.isnan()) and torch.equal(*numbers)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_of_half_precision_is_widened_as_it_is(dtype):
    halves = EVERY.view(dtype).to(device())
    result = torch.full(halves.shape, torch.nan, device=halves.device)
    widen_kernel[(1,)](halves, result, COUNT=halves.numel())
    assert same_bits(result, halves.float())


@pytest.mark.parametrize("dtype", HALVES)
def test_active_numbers_are_rounded_to_the_nearest_and_others_are_0(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4096, generator=generator)
    values[::7] *= 1e-6
    values[::11], values[::13], values[::17] = torch.nan, torch.inf, 1e30
    active = torch.rand(4096, generator=generator) < 0.5
    values, active = values.to(device()), active.to(device())
    result = torch.full((4096,), torch.nan, dtype=dtype, device=values.device)
    narrow_kernel[(1,)](values, active.view(torch.uint8), result, COUNT=4096)
    assert same_bits(result, torch.where(active, values, 0).to(dtype))
