"""Leaving out a step of the optimiser whose loss or gradient is not finite."""

from __future__ import annotations

import torch
from torch import Tensor


def step_where(finite: Tensor, optimizer: torch.optim.Optimizer, *, wait: bool) -> None:
    """Step where `finite`, a 0-dim bool tensor, holds True.

    A fused optimiser reads it on the device. Any other, and on a CPU every one, is called or not
    called where `wait` allows to look.
    """
    if wait and (finite.device.type == "cpu" or not _can_skip(optimizer)):
        if finite:
            optimizer.step()
        return
    # The attributes by which GradScaler tells a fused optimiser to leave out a step.
    optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def check_capturable(optimizer: torch.optim.Optimizer, class_mixing: float) -> None:
    """ValueError for a decision of the host amid a step, which a CUDA graph cannot hold."""
    if not _can_skip(optimizer):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} without fused=True cannot leave out a step on "
            "the device; capturable needs a fused optimiser"
        )
    if class_mixing not in (0, 1):
        raise ValueError(
            f"class_mixing: got {class_mixing}, expected 0 or 1 with capturable, as the host draws "
            "whether a step mixes"
        )


def _can_skip(optimizer: torch.optim.Optimizer) -> bool:
    return getattr(optimizer, "_step_supports_amp_scaling", False)
