"""How an operation that knows its gradient already gives it to autograd, once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def hand_over(ctx: Any, grad_value: Tensor | None) -> Tensor | None:
    """The gradient of the logits that the forward pass left on `ctx`, scaled to the loss's own.

    ctx: holds `gradient` and `scale` of the forward pass, the `kernels` that made them, the logits
    as its one saved tensor, and `again(logits)`, which computes the gradient anew: the first
    backward pass gives the gradient away, so one that is repeated (retain_graph) needs another.
    """
    if grad_value is None:
        return None
    (logits,) = ctx.saved_tensors
    with torch.no_grad():
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            gradient = ctx.again(logits)
        ctx.kernels.scale_(gradient, ctx.scale, grad_value)
    if torch.is_grad_enabled():  # create_graph=True
        return _DifferentiableOnce.apply(gradient, logits, grad_value)
    return gradient


class _DifferentiableOnce(torch.autograd.Function):
    """The gradient itself; whoever differentiates it is told that this cannot be done."""

    @staticmethod
    def forward(ctx, gradient, logits, grad_value):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "fastmt: the second derivative of a loss is not in the kernels; compute the loss under "
            'fastmt.backend("eager") to differentiate it twice'
        )
