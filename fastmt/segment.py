"""Segmentation of images: labels and confidence straight from low-resolution logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmt import arguments
from fastmt.confidence import KINDS, softmax_confidence
from fastmt.inputs import logits_of
from fastmt.reference import Confidence

__all__ = ["check_tiling", "segment"]

_PROBE = 64  # pixels; a multiple of every output stride in use that is a power of two


def segment(
    network: nn.Module,
    image: Tensor,
    *,
    tile: int | Sequence[int] | None = None,
    overlap: int | None = None,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    multiple: int | None = None,
    kind: str = "max_prob",
    temperature: float = 1.0,
) -> Confidence:
    """Most probable class of each pixel of an image, and how sure the network is of it.

    The logits are up-sampled, averaged over flips and scales (the mean of their softmaxes) and
    scored inside the kernel: at full resolution there is nothing but score and label. The network
    runs in eval mode and inference mode on its own device, which need not be the image's; its
    modules have their modes back afterwards.

    Args:
        network: module that maps images (N, K, H, W) to logits of any resolution: a tensor, a dict
            with "out", or an object with `.logits`.
        image: (K, H, W), or a batch (N, K, H, W) of one size. uint8 is divided by 255; floating
            point goes in as it is. Both in the type of the network's parameters.
        tile: height and width, or one number for both, of the largest input the network ever sees;
            rounded down to `multiple`. With a scale above 1 a tile covers that much less of the
            image. An image that fits runs whole. None: always whole.
        overlap: pixels of the image that neighbouring tiles share at least; each pixel is answered
            by the tile whose centre is nearest. Twice the radius of the receptive field plus 4
            `multiple` gives the result of the whole image. None: a quarter of the tile.
        flip: also segment the mirror image.
        scales: sizes, relative to the image, at which to segment it; each is rounded so that the
            sides of a tile become multiples of `multiple`.
        multiple: inputs are padded on the right and below, with the border's pixels, to a multiple
            of this; what the padding adds is cut off. None: the network's output stride, so that
            logits and pixels stay aligned, taken from the logits of a black 64 x 64 image. Give it
            for a network that wants other sizes (32 for many encoders, 14 for some transformers).
        kind, temperature: as in softmax_confidence.

    Returns:
        Confidence(score, label): float32 and int64, (H, W) or (N, H, W), on the image's device.
        They are ordinary tensors without gradient, fit for labels of a further training.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    _check(network, image, scales)
    arguments.check_choice("kind", kind, KINDS)
    arguments.check_positive("temperature", temperature)
    check_tiling(tile, overlap, scales, 1 if multiple is None else multiple)
    images = image if image.ndim == 4 else image[None]
    shape = (len(images), *images.shape[2:])
    # Allocated outside of inference mode, whose tensors no later training could save for backward.
    whole = Confidence(
        torch.empty(shape, dtype=torch.float32, device=image.device),
        torch.empty(shape, dtype=torch.int64, device=image.device),
    )
    dtype, device = _type_and_device(network, image)
    with _evaluating(network), torch.inference_mode():
        if multiple is None:
            multiple = _output_stride(
                network, torch.zeros(1, images.shape[1], _PROBE, _PROBE, dtype=dtype, device=device)
            )
        for rows, columns in check_tiling(tile, overlap, scales, multiple).tiles(*shape[1:]):
            part = _cut(images, rows, columns, device, torch.promote_types(dtype, torch.float32))
            views = _views(part, flip, scales, multiple)
            logits = [_logits(network, view.to(dtype), mirrored) for view, mirrored in views]
            found = softmax_confidence(
                logits, kind=kind, temperature=temperature, size=part.shape[2:]
            )
            for target, source in zip(whole, found, strict=True):
                target[:, rows.kept, columns.kept] = source[:, rows.inner, columns.inner]
    return whole if image.ndim == 4 else Confidence(whole.score[0], whole.label[0])


class _Span(NamedTuple):
    """A tile along one axis: it sees start .. stop and answers for first .. last."""

    start: int
    stop: int
    first: int
    last: int

    @property
    def kept(self) -> slice:
        return slice(self.first, self.last)

    @property
    def inner(self) -> slice:
        return slice(self.first - self.start, self.last - self.start)


class _Tiling(NamedTuple):
    """Sides of a tile in pixels of the image (None: whole), the overlap, and the tiles' lattice."""

    sides: tuple[int, int] | None
    overlap: int | None
    unit: int

    def tiles(self, height: int, width: int) -> Iterator[tuple[_Span, _Span]]:
        tall, wide = self.sides or (height, width)
        for rows in self._spans(height, tall):
            for columns in self._spans(width, wide):
                yield rows, columns

    def _spans(self, length: int, side: int) -> list[_Span]:
        """Tiles start on the lattice, where the logits of one are those of its neighbours."""
        padded = -(-length // self.unit) * self.unit
        if self.sides is None or side >= padded:
            return [_Span(0, padded, 0, length)]
        overlap = side // 4 if self.overlap is None else self.overlap
        step = max((side - overlap) // self.unit, 1) * self.unit
        starts = [*range(0, padded - side, step), padded - side]
        cuts = [0, *((a + b + side) // 2 for a, b in pairwise(starts)), length]
        return [_Span(s, s + side, *cut) for s, cut in zip(starts, pairwise(cuts), strict=True)]


def check_tiling(
    tile: int | Sequence[int] | None,
    overlap: int | None,
    scales: Sequence[float],
    multiple: int,
) -> _Tiling:
    """The tiling that `segment` uses; TypeError or ValueError where its arguments do not fit."""
    if not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"multiple: got {multiple!r}, expected a positive integer")
    if tile is None:
        if overlap is not None:
            raise ValueError(f"overlap: got {overlap} without a tile, expected both or none")
        return _Tiling(None, None, multiple)
    sides = (tile, tile) if isinstance(tile, int) else tile
    if not (isinstance(sides, Sequence) and [type(side) for side in sides] == [int, int]):
        raise TypeError(f"tile: got {tile!r}, expected an integer, or a height and a width")
    if overlap is not None and not isinstance(overlap, int):
        raise TypeError(f"overlap: got {overlap!r}, expected an integer")
    enlarged = max(1.0, *scales)
    seen = (side // multiple * multiple for side in sides)
    covered = tuple(math.floor(side / enlarged) // multiple * multiple for side in seen)
    if min(covered) < 1:
        least = math.ceil(multiple * enlarged / multiple) * multiple
        raise ValueError(
            f"tile: got {tile}, expected at least {least} pixels, as inputs are multiples of"
            f" {multiple} and the largest scale is {enlarged:g}"
        )
    most = min(covered) - multiple
    if overlap is not None and not 0 <= overlap <= most:
        raise ValueError(
            f"overlap: got {overlap}, expected 0 to {most} pixels for tiles that cover"
            f" {covered[0]} x {covered[1]} pixels of the image"
        )
    return _Tiling(covered, overlap, multiple)


def _check(network: nn.Module, image: Tensor, scales: Sequence[float]) -> None:
    if not isinstance(network, nn.Module):
        raise TypeError(f"network: got {type(network).__name__}, expected a torch.nn.Module")
    if not isinstance(image, Tensor):
        raise TypeError(f"image: got {type(image).__name__}, expected a tensor (K, H, W)")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image: got {image.dtype}, expected uint8 or floating point")
    if image.ndim not in (3, 4) or 0 in image.shape:
        raise ValueError(
            f"image: got shape {arguments.shape(image)}, expected (K, H, W) or (N, K, H, W), not"
            " empty"
        )
    if not isinstance(scales, Sequence) or not len(scales):
        raise ValueError(f"scales: got {scales!r}, expected a sequence of at least one number")
    for scale in scales:
        arguments.check_positive("scales", scale)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module has its own mode back, also a frozen one of its own."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _type_and_device(network: nn.Module, image: Tensor) -> tuple[torch.dtype, torch.device]:
    """Those of the network's parameters; without any, float32 and the image's device."""
    for parameter in network.parameters():
        if parameter.is_floating_point():
            return parameter.dtype, parameter.device
    return torch.float32, image.device


def _output_stride(network: nn.Module, probe: Tensor) -> int:
    """Pixels per logit; 1 for logits at the image's resolution or above."""
    return max(1, probe.shape[-1] // max(1, _logits(network, probe).shape[-1]))


def _cut(
    images: Tensor, rows: _Span, columns: _Span, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """A tile of the images; where it reaches beyond them, their last row and column go on."""
    part = images[:, :, rows.start : rows.stop, columns.start : columns.stop].to(device)
    part = part.to(dtype).div(255) if part.dtype == torch.uint8 else part.to(dtype)
    below = rows.stop - rows.start - part.shape[2]
    beside = columns.stop - columns.start - part.shape[3]
    return F.pad(part, (0, beside, 0, below), mode="replicate") if below or beside else part


def _views(
    part: Tensor, flip: bool, scales: Sequence[float], multiple: int
) -> Iterator[tuple[Tensor, bool]]:
    """A tile at every scale, and its mirror image; and whether it is the mirror image."""
    for scale in scales:
        size = [max(1, round(n * scale / multiple)) * multiple for n in part.shape[2:]]
        same = tuple(size) == part.shape[2:]
        view = part if same else F.interpolate(part, size, mode="bilinear", antialias=scale < 1)
        yield view, False
        if flip:
            yield view.flip(-1), True


def _logits(network: nn.Module, images: Tensor, mirrored: bool = False) -> Tensor:
    """Low-resolution logits; those of mirror images mirrored back, which up-sampling commutes with."""
    logits = logits_of(network(images), images, "network")
    return logits.flip(-1) if mirrored else logits
