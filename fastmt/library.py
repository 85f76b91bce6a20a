"""The operations as torch.library sees them: what each returns, without computing it.

With these a graph that torch.compile or torch.export traces holds the kernels as opaque nodes.
Outside of a trace nothing here runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
_LIBRARY = torch.library.Library("fastmt", "FRAGMENT")
# Of csrc/library.cpp, for kernels that are written in Python. An int[] as size would make a graph
# that is traced with dynamic shapes one of a single size. Graphs on a user's disk know an operation
# by its name alone: one that returns other tensors than in a release is another overload.
SCHEMAS = {
    "softmax_confidence": "(Tensor[] logits, int kind, float inverse_temperature, SymInt[]? size,"
    " bool align_corners) -> (Tensor score, Tensor label)",
    "consistency_loss": "(Tensor student, Tensor[] teacher, Tensor threshold, Tensor? pixel_weight,"
    " Tensor? valid, int[] options, float inverse_temperature, SymInt[]? size, bool align_corners,"
    " bool wants_gradient)"
    " -> (Tensor loss, Tensor selected, Tensor mean_score, Tensor scale, Tensor gradient)",
    "cross_entropy": "(Tensor logits, Tensor labels, Tensor? pixel_weight, Tensor? class_weight,"
    " int[] options, float label_smoothing, bool align_corners, bool wants_gradient)"
    " -> (Tensor loss, Tensor scale, Tensor gradient, Tensor wrong)",
    "resample_slices": "(Tensor slices, SymInt out, bool align_corners) -> Tensor",
    "resample_slices_backward": "(Tensor gradient, SymInt depth, bool align_corners) -> Tensor",
}


def constant_while_tracing(function: Callable[[], _T]) -> Callable[[], _T]:
    """torch.compiler.assume_constant_result, which would import all of dynamo with fastmt."""
    function._dynamo_marked_constant = True
    return function


def register_fakes() -> None:
    """Tell torch.library what the operations of the loaded library return."""
    for fake in (*_FAKES, ema_update_, scale_):
        torch.library.register_fake(f"fastmt::{fake.__name__}", fake, lib=_LIBRARY)


def define(namespace: str, kernels: Any) -> torch.library.Library:
    """Make nodes of a graph, torch.ops.<namespace>, of kernels that are written in Python.

    kernels: has functions by the names and signatures of csrc/library.cpp. What is returned has to
    be kept: with it the nodes end.
    """
    nodes = torch.library.Library(namespace, "DEF")
    for fake in _FAKES:
        name = fake.__name__
        nodes.define(name + SCHEMAS[name])
        nodes.impl(name, getattr(kernels, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=nodes)
    return nodes


def softmax_confidence(
    logits: list[Tensor],
    kind: int,
    inverse_temperature: float,
    size: Sequence[int] | None,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    first = logits[0]
    out = (first.shape[0], *(first.shape[2:] if size is None else size))
    score = first.new_empty(out, dtype=torch.float32)
    return score, first.new_empty(out, dtype=torch.int64)


def consistency_loss(
    student: Tensor,
    teacher: list[Tensor],
    threshold: Tensor,
    pixel_weight: Tensor | None,
    valid: Tensor | None,
    options: Sequence[int],
    inverse_temperature: float,
    size: Sequence[int] | None,
    align_corners: bool,
    wants_gradient: bool,
) -> tuple[Tensor, ...]:
    loss, selected, mean_score, scale = (_scalar(student) for _ in range(4))
    return loss, selected, mean_score, scale, _gradient(student, wants_gradient)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    options: Sequence[int],
    label_smoothing: float,
    align_corners: bool,
    wants_gradient: bool,
) -> tuple[Tensor, ...]:
    loss, scale, wrong = (_scalar(logits) for _ in range(3))
    return loss, scale, _gradient(logits, wants_gradient), wrong


def resample_slices(slices: Tensor, out: int, align_corners: bool) -> Tensor:
    return _resampled(slices, out)


def resample_slices_backward(gradient: Tensor, depth: int, align_corners: bool) -> Tensor:
    return _resampled(gradient, depth)


def ema_update_(table: Tensor, starts: Tensor, decays: Tensor, draws: Tensor | None = None) -> None:
    pass


def scale_(data: Tensor, scale: Tensor, factor: Tensor) -> None:
    pass


def _scalar(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.float32)


def _resampled(slices: Tensor, depth: int) -> Tensor:
    return slices.new_empty((slices.shape[0], depth, *slices.shape[2:]), dtype=torch.float32)


def _gradient(logits: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(logits) if wanted else logits.new_empty(0)


_FAKES = (
    softmax_confidence,
    consistency_loss,
    cross_entropy,
    resample_slices,
    resample_slices_backward,
)
