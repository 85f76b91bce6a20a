"""A student's tensors on their way from a GPU to a teacher on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Staging:
    """Host copies of tensors: started without a wait, read once they have arrived.

    The copies go to pinned memory in the order of each device's current stream, so that they see
    the values of now and are done before later work of that stream writes new ones. What comes from
    the CPU is copied at once, which is how the tests run this; pinned memory and events need a GPU.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        self._values = list(values)
        self.copies = [_host_copy(value) for value in self._values]
        self._arrived: list[torch.cuda.Event] = []
        self._decays: list[float | Tensor] = []
        self._draws: list[int | Tensor] = []
        self.is_full = False

    def fits(self) -> bool:
        """Whether the tensors have the layout that they were first seen with."""
        pairs = zip(self._values, self.copies, strict=True)
        return all(v.shape == c.shape and v.dtype == c.dtype for v, c in pairs)

    @torch.no_grad()
    def fill(self, decays: Sequence[float | Tensor], draws: Sequence[int | Tensor]) -> None:
        """Start copies of the tensors, of the decays and of the draws."""
        for copy, value in zip(self.copies, self._values, strict=True):
            copy.copy_(value, non_blocking=True)
        self._decays, self._draws = list(map(_sent, decays)), list(map(_sent, draws))
        self.is_full = True
        scalars = [scalar for scalar in (*decays, *draws) if isinstance(scalar, Tensor)]
        devices = {tensor.device for tensor in (*self._values, *scalars)}
        self._arrived = [_recorded(device) for device in devices if device.type == "cuda"]

    def empty(self) -> tuple[list[float], list[int]]:
        """Wait until all has arrived; the decays and draws of the averages to make."""
        for event in self._arrived:
            event.synchronize()
        self.is_full = False
        return list(map(float, self._decays)), list(map(int, self._draws))


def _recorded(device: torch.device) -> torch.cuda.Event:
    """An event behind all that the device's current stream has been given."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _host_copy(value: Tensor) -> Tensor:
    return torch.empty_like(value, device="cpu", pin_memory=value.device.type == "cuda")


def _sent(scalar: float | Tensor) -> float | Tensor:
    if not isinstance(scalar, Tensor):
        return scalar
    return _host_copy(scalar).copy_(scalar, non_blocking=True)
