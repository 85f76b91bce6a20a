"""The tensors of a moving average as a kernel on a device finds them: a table of addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 16 * 1024  # elements in one piece of work, as in csrc/cpu/ema_host.h
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/cpu/calls.h


def table(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What `torch.ops.fastmt.ema_update_(rows, starts, decay)` reads; valid while no tensor moves.

    Returns:
        rows: int64 (tensors, 5): teacher pointer, student pointer, length, both dtypes as in TYPES.
        starts: int64 (tensors + 1): how many chunks of CHUNK elements come before each tensor.
    """
    rows = [
        (t.data_ptr(), s.data_ptr(), t.numel(), TYPES[t.dtype], TYPES[s.dtype])
        for t, s in zip(teacher, student, strict=True)
    ]
    lines = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)
    chunks = (lines[:, 2] + CHUNK - 1) // CHUNK
    return lines, torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])
