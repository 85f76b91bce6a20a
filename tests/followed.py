"""A small student with every kind of parameter and buffer, how it moves on, and who reads it."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmt import EMATeacher


class Net(nn.Module):
    """Batch norm (float and integer buffers), a bool buffer and a tied parameter."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4, dtype=dtype)
        self.norm = nn.BatchNorm1d(4, dtype=dtype)
        self.last = nn.Linear(4, 4, dtype=dtype)
        self.tied = self.last.weight
        self.register_buffer("flag", torch.tensor(False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.norm(self.first(x)), self.tied)


@torch.no_grad()
def advance(network: nn.Module, seed: int) -> None:
    """One step of some training: every parameter and buffer takes new values."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    network.norm.running_mean.copy_(torch.randn(4, generator=generator))
    network.norm.num_batches_tracked += 1
    network.flag.logical_not_()


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def assert_same(left: nn.Module, right: nn.Module) -> None:
    for (name, a), (other, b) in zip(
        left.state_dict().items(), right.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b), name


def follow(teacher: EMATeacher, student: Net, steps: int) -> list[dict[str, torch.Tensor]]:
    seen = []
    for seed in range(steps):
        advance(student, seed)
        seen.append(weights(student))
        teacher.update()
    return seen


class NoHostReads(TorchDispatchMode):
    """Fails where a value is read on the host, for which a device would have to be waited for."""

    def __init__(self, allowed: bool = False) -> None:
        super().__init__()
        self.allowed = allowed

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        read = function is torch.ops.aten._local_scalar_dense.default
        assert self.allowed or not read, "waits for the device"
        return function(*args, **(kwargs or {}))
