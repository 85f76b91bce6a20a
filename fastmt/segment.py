"""Segmenting images: labels and confidence straight from low-resolution logits.

The passes over one image (flips, scales) are an ensemble whose softmaxes are averaged while they
are up-sampled, so that nothing of the image's size exists but score and label.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmt import arguments
from fastmt.confidence import KINDS, softmax_confidence
from fastmt.inputs import logits_of
from fastmt.reference import Confidence

__all__ = ["segment", "tile_side"]

LARGEST_SCALE = 1e9  # with it no side of an image is beyond the integers of 64 bits


class Span(NamedTuple):
    """One axis of a tile: pixels [start, stop) are looked at, [first, last) are kept."""

    start: int
    stop: int
    first: int
    last: int


def segment(
    network: nn.Module,
    images: Tensor,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    divisor: int = 1,
    kind: str = "max_prob",
    temperature: float = 1.0,
) -> Confidence:
    """Label and confidence score of every pixel.

    Args:
        network: maps images (N, 3, h, w) to logits (N, C, h', w') of any resolution: a tensor, a
            dict with "out", or an object with `.logits`. It runs in eval mode, and has its own mode
            again afterwards.
        images: (3, H, W) or (N, 3, H, W), on the network's device; uint8, which is divided by 255,
            or floating point, taken as it is. The network sees them in its parameters' dtype.
        tile: largest side, in pixels, that the network ever sees; None shows images whole. With a
            scale above 1 a tile covers that much less of the image, see tile_side. Memory is that
            of a tile, besides images and result.
        overlap: pixels of the image that neighbouring tiles share; each is kept from the tile where
            it lies further inside. From twice the network's reach on, tiles leave no trace. None: a
            quarter of a tile.
        flip: also look at the mirrored image.
        scales: look at the image resized by each of these factors.
        divisor: the network's inputs are padded, by repeating their last row and column, and tiles
            are placed, at multiples of this many pixels. With the network's output stride, logits
            stand over the pixels that they describe at any size of the image.
        kind, temperature: of the score, see softmax_confidence.

    Returns:
        Confidence(score, label): float32 and int64, (H, W) or (N, H, W) as the images; ordinary
        tensors, which can teach another network.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    _check(network, images)
    divisor = arguments.as_index("divisor", divisor)
    _check_steps(scales, divisor)
    arguments.check_flag("flip", flip)
    arguments.check_choice("kind", kind, KINDS)
    arguments.check_positive("temperature", temperature)
    side = None if tile is None else tile_side(tile, scales, divisor)
    shared = _shared(overlap, side)
    batch = images if images.ndim == 4 else images[None]
    # Made outside of inference mode, whose tensors autograd refuses to save for a backward.
    score = torch.empty((len(batch), *batch.shape[2:]), dtype=torch.float32, device=images.device)
    label = torch.empty_like(score, dtype=torch.int64)
    rows, columns = (spans(length, side, shared, divisor) for length in batch.shape[2:])
    with _evaluating(network), torch.inference_mode():
        for row in rows:
            for column in columns:
                part = batch[:, :, row.start : row.stop, column.start : column.stop]
                passes, size = _look(network, part, flip, scales, divisor)
                seen = softmax_confidence(passes, kind=kind, temperature=temperature, size=size)
                to = (slice(None), slice(row.first, row.last), slice(column.first, column.last))
                inside = (
                    slice(None),
                    slice(row.first - row.start, row.last - row.start),
                    slice(column.first - column.start, column.last - column.start),
                )
                score[to], label[to] = seen.score[inside], seen.label[inside]
    return Confidence(score, label) if images.ndim == 4 else Confidence(score[0], label[0])


def tile_side(tile: int, scales: Sequence[float], divisor: int = 1) -> int:
    """Pixels of the image along a tile's side: enlarged by the largest scale they fit in `tile`.

    Raises ValueError where a tile is no positive multiple of `divisor`, or covers less than one.
    """
    tile, divisor = arguments.as_index("tile", tile), arguments.as_index("divisor", divisor)
    _check_steps(scales, divisor)
    if tile < 1 or tile % divisor:
        raise ValueError(f"tile: got {tile}, expected a positive multiple of divisor {divisor}")
    largest = max(1, *scales)
    side = math.floor(tile / largest) // divisor * divisor
    if side < 1:
        least = math.ceil(largest) * divisor
        raise ValueError(f"tile: got {tile}, expected at least {least} at scale {largest:g}")
    return side


def _shared(overlap: int | None, side: int | None) -> int:
    if overlap is None:
        return 0 if side is None else side // 4
    overlap = arguments.as_index("overlap", overlap)
    if side is None:
        raise ValueError(f"overlap: got {overlap} without a tile, expected None; give tile too")
    if not 0 <= overlap < side:
        raise ValueError(
            f"overlap: got {overlap}, expected 0 up to less than the {side} pixels a tile covers"
        )
    return overlap


def spans(length: int, tile: int | None, overlap: int, divisor: int = 1) -> list[Span]:
    """Tiles along one axis, starting at multiples of `divisor`; what they keep covers it once."""
    if tile is None or length <= tile:
        return [Span(0, length, 0, length)]
    step = max((tile - overlap) // divisor, 1) * divisor
    starts = list(range(0, length - tile, step))
    starts.append(-(-(length - tile) // divisor) * divisor)
    stops = [min(start + tile, length) for start in starts]
    inner = [(stop + start) // 2 for stop, start in zip(stops[:-1], starts[1:], strict=True)]
    return [Span(*each) for each in zip(starts, stops, [0, *inner], [*inner, length], strict=True)]


def _look(
    network: nn.Module, part: Tensor, flip: bool, scales: Sequence[float], divisor: int
) -> tuple[list[Tensor], tuple[int, int]]:
    """Logits of every pass over a tile, upright, and the size that they all stand for."""
    parameters = (p.dtype for p in network.parameters() if p.is_floating_point())
    dtype = next(parameters, torch.float32)
    working = torch.promote_types(dtype, torch.float32)  # to divide and resize in
    pixels = part.to(working) / 255 if part.dtype == torch.uint8 else part.to(working)
    height, width = (-(-side // divisor) * divisor for side in part.shape[2:])
    padding = (0, width - part.shape[3], 0, height - part.shape[2])
    padded = F.pad(pixels, padding, mode="replicate") if any(padding) else pixels
    passes = []
    for scale in scales:
        view = _resized(padded, scale, divisor).to(dtype)
        # A network may write into what it is given: the next pass and the caller look at it too.
        passes.append(logits_of(network(view.clone()), view, "network"))
        if flip:
            passes.append(logits_of(network(view.flip(-1)), view, "network").flip(-1))
    return passes, (height, width)


def _resized(images: Tensor, scale: float, divisor: int) -> Tensor:
    if scale == 1:
        return images
    size = [max(round(side * scale / divisor), 1) * divisor for side in images.shape[2:]]
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode; each module has its own mode again afterwards."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check(network: nn.Module, images: Tensor) -> None:
    if not isinstance(network, nn.Module):
        raise TypeError(f"network: got {type(network).__name__}, expected a torch.nn.Module")
    if not isinstance(images, Tensor):
        raise TypeError(f"images: got {type(images).__name__}, expected a tensor of images")
    named = itertools.chain(network.named_parameters(), network.named_buffers())
    unmade = next((name for name, tensor in named if tensor.is_meta), None)
    if unmade is not None and not images.is_meta:  # a copy from there changes nothing, untold
        raise ValueError(
            f"network: got {unmade} on the device meta, expected values; load its weights with"
            " assign=True, or after to_empty()"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images: got {images.dtype}, expected uint8 or floating point")
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"images: got shape {arguments.shape(images)}, expected (3, H, W) or (N, 3, H, W), not"
            " empty"
        )


def _check_steps(scales: Sequence[float], divisor: int) -> None:
    arguments.check_at_least("divisor", divisor, 1)
    if not isinstance(scales, Sequence):
        raise TypeError(f"scales: got {type(scales).__name__}, expected a sequence of factors")
    if not len(scales):
        raise ValueError("scales: got none, expected at least one factor")
    for scale in scales:
        arguments.check_positive("scales", scale)
        arguments.check_between("scales", scale, 0, LARGEST_SCALE)
