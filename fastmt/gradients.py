"""How an operation that knows its gradient already gives it to autograd, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Whether the backward pass that runs may be repeated.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class KnownGradient(torch.autograd.Function):
    """A loss whose forward pass leaves the gradient too."""

    @classmethod
    def record(cls, *arguments: Any) -> Any:
        """apply(), without what that does for torch.func, under which no kernel is called."""
        if torch.compiler.is_compiling():
            return cls.apply(*arguments)
        return super(torch.autograd.Function, cls).apply(*arguments)


def in_units(
    weights: Tensor | None, logits: Tensor, wants_gradient: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Weights in float32, and what they have been divided by, a power of two near the largest.

    The gradient of float16 logits is stored before what it is divided by and multiplied with is
    known: of weights near 1 it keeps within the range of float16. For all others that is None.
    """
    if weights is None:
        return None, None
    weights = weights.float()
    if not wants_gradient or logits.dtype != torch.float16:
        return weights, None
    low, high = weights.detach().aminmax() if weights.numel() else weights.new_ones(2)
    unit = torch.maximum(high, -low).log2().floor().exp2()
    unit = torch.where((unit > 0) & (unit < torch.inf), unit, 1)
    return weights / unit, unit


def times(value: Tensor, *units: Tensor | None) -> Tensor:
    """The value of weights as they were given, from that of weights in units."""
    for unit in units:
        value = value if unit is None else value * unit
    return value


def keep(
    ctx: Any,
    kernels: Any,
    logits: Tensor,
    others: Sequence[Tensor | float | None],
    gradient: Tensor,
    scale: Tensor,
) -> None:
    """Leave on `ctx` what `hand_over` needs; the caller adds `again(logits)`.

    That computes the gradient anew, from `others` too: the first backward pass gives the gradient
    away, so one that is repeated (retain_graph) needs another.
    """
    ctx.traced = torch.compiler.is_compiling()
    if ctx.traced:  # what a graph saves is never written to, so it serves any number of times
        ctx.save_for_backward(gradient, scale)
        return
    # The teacher's logits may be inference tensors, which save_for_backward refuses.
    ctx.save_for_backward(logits)
    ctx.kernels, ctx.gradient, ctx.scale = kernels, gradient, scale
    ctx.versions = [
        (other, other._version)
        for other in others
        if isinstance(other, Tensor) and not other.is_inference()
    ]


def hand_over(ctx: Any, grad_value: Tensor | None) -> Tensor | None:
    """The gradient of the logits that the forward pass left on `ctx`, scaled to the loss's own."""
    if grad_value is None:
        return None
    if ctx.traced:
        gradient, scale = ctx.saved_tensors
        return _product(gradient, scale, grad_value)
    (logits,) = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return _scaled(ctx, logits, grad_value)
    with torch.no_grad():  # create_graph=True
        gradient = _scaled(ctx, logits, grad_value)
    return DifferentiableOnce.apply(gradient, logits, grad_value)


def _scaled(ctx: Any, logits: Tensor, grad_value: Tensor) -> Tensor:
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None:
        gradient = _computed_again(ctx, logits)
    if not _graph_is_kept():  # as PyTorch lets go of what it saved, though the loss may live on
        ctx.again, ctx.versions = None, []
    if is_batched(grad_value):
        return _product(gradient, ctx.scale, grad_value)
    ctx.kernels.scale_(gradient, ctx.scale, grad_value)
    return gradient


def is_batched(tensor: Tensor) -> bool:
    """Whether it stands for several, as in is_grads_batched=True and vmap: no kernel reads them."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(tensor) or functorch.is_batchedtensor(tensor)


def _product(gradient: Tensor, scale: Tensor, grad_value: Tensor) -> Tensor:
    factor = scale * grad_value
    scaled = torch.where(factor == 0, 0, gradient.float() * factor)  # nothing, even of NaN
    return scaled.to(gradient.dtype)


def _computed_again(ctx: Any, logits: Tensor) -> Tensor:
    if any(tensor._version != version for tensor, version in ctx.versions):
        raise RuntimeError(
            "fastmt: the backward pass of a loss is repeated, but its teacher, labels, threshold "
            "or a map of its pixels was modified in place since; clone what you modify"
        )
    return ctx.again(logits)


class DifferentiableOnce(torch.autograd.Function):
    """The gradient itself; whoever differentiates it is told that this cannot be done."""

    @staticmethod
    def forward(ctx, gradient, *_):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "fastmt: the second derivative of a loss is not in the kernels; compute the loss under "
            'fastmt.backend("eager") to differentiate it twice'
        )
