"""The teacher's network: copied from the student's, in a dtype in which an average moves."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastmt.matching import matched, reshard

HALVES = (torch.bfloat16, torch.float16)


def copied(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise TypeError(
            f"student: {type(network).__name__} cannot be copied ({error}); with fully_shard make "
            "the teacher first, then shard student and teacher.module alike"
        ) from error


def check_wide(network: nn.Module, rounding: str | None) -> None:
    for name, parameter in network.named_parameters():
        if parameter.dtype in HALVES and rounding is None:
            raise TypeError(
                f"teacher: {name!r} is {parameter.dtype}, expected float32 or float64; in half "
                "precision the average does not move"
            )


def retype(network: nn.Module, dtype: torch.dtype | None, rounding: str | None) -> None:
    """Give the parameters the dtype of the teacher's."""
    if dtype in HALVES and rounding is None:
        raise ValueError(
            f"dtype: got {dtype}, expected float32 or float64; in half precision the average does "
            "not move, since a step of (1 - decay) is below its rounding, unless rounding= is "
            "'stochastic' or 'kahan'"
        )
    if dtype not in (None, torch.float32, torch.float64, *HALVES):
        raise ValueError(f"dtype: got {dtype}, expected float32, float64, bfloat16 or float16")
    for parameter in network.parameters():
        if parameter.is_floating_point():
            widened = parameter.dtype in HALVES and rounding is None
            wanted = dtype or (torch.float32 if widened else parameter.dtype)
            parameter.data = parameter.data.to(wanted)
    if rounding is not None and not any(p.dtype in HALVES for p in network.parameters()):
        raise ValueError(
            f"rounding: got {rounding!r} for a teacher without parameters in half precision; "
            "expected dtype=torch.bfloat16 or torch.float16 with it"
        )


def all_pairs(network: nn.Module, other: nn.Module) -> list[tuple[Tensor, Tensor]]:
    reshard((network, other))
    pairs = [
        *matched(network.named_parameters(), other.named_parameters()),
        *matched(network.named_buffers(), other.named_buffers()),
    ]
    return [(pair.average, pair.value) for pair in pairs]
