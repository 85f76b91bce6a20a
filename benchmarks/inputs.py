"""The tensors that are measured: random, but without a pixel that rounding could decide."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.shapes import Shape
from fastmt import reference

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_MARGIN = 1e-3


def logits(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: torch.device,
    seed: int,
    threshold: float | None = None,
    in_steps: bool = False,
) -> Tensor:
    """Logits (N, C, *spatial) whose pixels are independent, about half of them surer than 0.7.

    The best class leads everywhere, and the largest probability stays clear of `threshold`:
    otherwise two right implementations could differ in a whole pixel. Independent pixels are the
    hardest case for a kernel that skips what does not pass: hardly a vector has none that does.
    `in_steps` makes them multiples of 1/8, the classes 2^-16 apart: between pixels, at strides up
    to 8, no two classes come nearer than that, so that every implementation finds the same label.
    """
    generator = torch.Generator(device).manual_seed(seed)
    values = (4 * torch.randn(shape.dims, generator=generator, device=device)).to(dtype)
    if in_steps:
        offsets = (
            torch.arange(shape.classes, device=device).view(-1, *[1] * len(shape.spatial))
            * 2.0**-16
        )
        return ((8 * values).round() / 8 + offsets).to(memory_format=LAYOUTS[layout])
    _lift(values, _leads_narrowly(values))
    if threshold is not None:
        _lift(values, (values.float().softmax(1).amax(1) - threshold).abs() < _MARGIN)
    return values.to(memory_format=LAYOUTS[layout])


def clear_threshold(teacher: Tensor, size: Sequence[int], *, near: float) -> float:
    """The threshold amid the widest gap between the up-sampled teacher's scores within 0.01.

    Interpolated pixels cannot be kept clear of a threshold one by one, so the threshold gives way.
    """
    large = reference.upsample(teacher.double(), size, False)
    scores = large.softmax(1).amax(1).flatten()
    scores = scores[(scores - near).abs() < 0.01].sort().values
    if len(scores) < 2:
        return near
    widest = scores.diff().argmax()
    return float(scores[widest : widest + 2].mean())


def labels(shape: Shape, *, device: torch.device, seed: int) -> Tensor:
    """Labels int64 (N, *spatial), a tenth of them 255."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch, *shape.spatial)
    values = torch.randint(shape.classes, size, generator=generator)
    values[torch.rand(size, generator=generator) < 0.1] = 255
    return values.to(device)


def parameters(
    shapes: tuple[tuple[int, ...], ...], *, device: torch.device, seed: int
) -> list[Tensor]:
    """Float32 tensors like those of a network."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def _leads_narrowly(values: Tensor) -> Tensor:
    best = values.float().topk(2, dim=1).values
    return best[:, 0] - best[:, 1] < _MARGIN


def _lift(values: Tensor, where: Tensor) -> None:
    """Raise the largest logit by one in these pixels; `where` is bool (N, *spatial)."""
    best = values.argmax(1, keepdim=True)
    values.scatter_add_(1, best, where.unsqueeze(1).to(values.dtype))
