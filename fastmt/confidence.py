"""Softmax confidence: how sure a teacher is at each pixel, and of what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastmt import arguments, backends, planes, reference
from fastmt.reference import Confidence

KINDS = ("max_prob", "entropy", "margin")
MAX_CLASSES, MAX_RANK = 4096, 8  # as in csrc/cpu/calls.h


def softmax_confidence(
    logits: Tensor | Sequence[Tensor],
    *,
    kind: str = "max_prob",
    temperature: float = 1.0,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
) -> Confidence:
    """Score in [0, 1] and most probable class of each pixel of q = softmax(logits / temperature).

    Args:
        logits: (N, C, *spatial), float32, bfloat16, float16 or float64, any strides. A sequence is
            an ensemble: the softmaxes are averaged before they are scored.
        kind: "max_prob" max_c q_c; "entropy" 1 - H(q) / ln C; "margin" largest minus second
            largest q_c.
        temperature: positive; above 1 softens q.
        size: output size of the spatial dimensions; the logits are up-sampled to it as by
            F.interpolate (bilinear in 2-D) before the softmax. None: the logits' own.
        align_corners: as in F.interpolate.

    Returns:
        Confidence(score, label): score float32 (float64 for float64 logits) and label int64, both
        (N, *out). Neither is differentiable. A pixel whose logits hold a NaN scores NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    members = arguments.members_of(logits)
    backend, inside = backends.remembered(_choose, members, kind, temperature, size, align_corners)
    members = arguments.detached(members)
    if backend == "eager":
        return reference.softmax_confidence(
            members,
            kind=kind,
            temperature=float(temperature),
            size=size,
            align_corners=align_corners,
        )
    pixels = planes.logits_of_planes(members, size, align_corners, backend)
    kernels = backends.operations(backend)
    score, label = kernels.softmax_confidence(
        pixels, KINDS.index(kind), 1 / float(temperature), inside, align_corners
    )
    if pixels[0].ndim == members[0].ndim:
        return Confidence(score, label)
    out = (len(members[0]), *size)
    return Confidence(score.view(out), label.view(out))


class _Choice(NamedTuple):
    backend: str
    inside: list[int] | None  # the size that the kernels up-sample to


def _choose(
    members: list[Tensor],
    kind: str,
    temperature: float,
    size: Sequence[int] | None,
    align_corners: bool,
) -> _Choice:
    arguments.check_members("logits", members)
    arguments.check_choice("kind", kind, KINDS)
    arguments.check_positive("temperature", temperature)
    arguments.check_flag("align_corners", align_corners or False)  # None, as in F.interpolate
    arguments.output_shape([("logits", member) for member in members], size)
    inside = planes.plane_size(members, size)
    choice = backends.choose(
        "softmax_confidence",
        members,
        obstacle=shape_obstacle(members[0]),
        upsampled=inside is not None,
    )
    return _Choice(choice.backend, inside)


def shape_obstacle(logits: Tensor) -> str | None:
    """Why the kernels do not serve logits of a shape, if they do not."""
    classes = logits.shape[1]
    if classes > MAX_CLASSES:
        return f"{classes} classes are more than the {MAX_CLASSES} that the kernels hold"
    if logits.ndim - 1 <= MAX_RANK:  # without a look at sizes, which a trace may leave open
        return None
    rank = sum(size > 1 for size in (logits.shape[0], *logits.shape[2:]))
    if rank > MAX_RANK:
        return f"{rank} dimensions of pixels are more than the {MAX_RANK} that the kernels walk"
    return None
