"""Random words that follow from a seed and a place alone, in integer arithmetic of any device."""

from __future__ import annotations

import torch
from torch import Tensor

_ROTATIONS = ((10, 26), (11, 21), (13, 27), (23, 5), (6, 20), (17, 11), (25, 10), (18, 20))


def random_words(counters: Tensor, seed: Tensor) -> Tensor:
    """Four random words (4, n), int32, for each of n int64 counters: Threefry-4x32, 13 rounds.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    """
    low, high = seed.to(torch.int32), (seed >> 32).to(torch.int32)
    key = (low, high, torch.zeros_like(low), torch.zeros_like(low), low ^ high ^ 0x1BD11BDA)
    x = torch.zeros((4, len(counters)), dtype=torch.int32, device=counters.device)
    x[0], x[1] = counters.to(torch.int32) + low, (counters >> 32).to(torch.int32) + high
    for i in range(13):
        partners = (3, 1) if i % 2 else (1, 3)
        for even, odd, left in zip((0, 2), partners, _ROTATIONS[i % 8], strict=True):
            x[even] += x[odd]
            # A shift to the right brings copies of the sign, which are masked off.
            out_left = (x[odd] >> (32 - left)).bitwise_and_((1 << left) - 1)
            x[odd].bitwise_left_shift_(left).bitwise_or_(out_left).bitwise_xor_(x[even])
        if i % 4 == 3:
            block = i // 4 + 1
            for j in range(4):
                x[j] += key[(block + j) % 5]
            x[3] += block
    return x
