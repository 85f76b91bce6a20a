"""Logits and maps for the tests: random values in any layout, thresholds away from scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastmt import reference

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
LAYOUTS = ("contiguous", "channels_last", "cropped", "transposed", "expanded")
GAP = 1e-5  # scores and thresholds at least this far apart compare alike in float32 and float64


def shapes(classes: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, ...]]:
    """(N, C), (N, C, L), (N, C, H, W) and (N, C, D, H, W), of odd and even sizes."""
    sides = {0: 1, 1: 400, 2: 19, 3: 7}

    def of_rank(rank: int) -> st.SearchStrategy[tuple[int, ...]]:
        batch = st.integers(1, 400 if rank == 0 else 3)
        return st.tuples(batch, classes, *[st.integers(1, sides[rank])] * rank)

    return st.integers(0, 3).flatmap(of_rank)


def laid_out(values: Tensor, layout: str, class_dim: bool = True) -> Tensor:
    """`values` in another layout; "expanded" repeats the first item of the last dimension."""
    if layout == "channels_last" and class_dim:
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "cropped":
        around = values.new_full([size + 3 for size in values.shape], 7)
        inside = around[tuple(slice(2, 2 + size) for size in values.shape)]
        return inside.copy_(values)
    if layout == "transposed":
        order = list(range(values.ndim))[::-1]
        return values.permute(order).contiguous().permute(order)
    if layout == "expanded" and values.ndim != 2:
        return values[..., :1].expand_as(values)
    if layout == "expanded":
        return values[:1].expand_as(values)
    return values.contiguous()


def random_logits(
    shape: Sequence[int], seed: int, scale: float = 3.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tuple(shape), generator=generator) * scale).to(dtype)


def without_ties(members: Sequence[Tensor], temperature: float = 1.0) -> list[Tensor]:
    """The same teachers, with a sure label where the two best classes were nearly equal."""
    if members[0].shape[1] == 1:
        return list(members)
    q, _ = reference.ensemble_softmax([m.double() for m in members], temperature, None, False)
    top = q.topk(2, dim=1).values
    tie = (top[:, :1] - top[:, 1:] < GAP).expand_as(q).clone()
    tie[:, 1:] = False
    return [torch.where(tie, m.amax() + 1, m) for m in members]


def teachers(
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    layout: str,
    scale: float = 3.0,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Tensor]:
    """An ensemble without ties, one member a dtype, the first of them in `layout`."""
    members = [random_logits(shape, seed + i, scale, dtype) for i, dtype in enumerate(dtypes)]
    members = [laid_out(member, layout).contiguous() for member in members]
    members = without_ties(members, temperature)
    return [laid_out(members[0], layout), *members[1:]]


def threshold_near(scores: Tensor, quantile: float) -> float:
    """A threshold that passes about 1 - quantile of the scores and lies at least GAP from each."""
    steps = torch.cat([scores.new_tensor([-1.0]), scores.double().flatten().sort().values])
    steps = torch.cat([steps, scores.new_tensor([2.0])]).double()
    wide = ((steps[1:] - steps[:-1]) > 2 * GAP).nonzero().squeeze(1)
    nearest = (wide - quantile * (len(steps) - 2)).abs().argmin()
    at = wide[nearest]
    return float((steps[at] + steps[at + 1]) / 2)


def thresholds_by_class(scores: Tensor, labels: Tensor, classes: int, quantile: float) -> Tensor:
    limits = [threshold_near(scores[labels == c], quantile) for c in range(classes)]
    return torch.tensor(limits, dtype=torch.float32)
