"""Styles: the source image with the look of the target, so that its labels teach the target.

A style is any callable `(source, target) -> images` that leaves the geometry of `source` alone. The
functions here return new tensors, compute in float32 and carry no gradient: they prepare data.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmt import arguments

Style = Callable[[Tensor, Tensor], Tensor]

__all__ = ["Style", "as_style", "fourier_style", "match_statistics"]

_FEW_WAVES = 24  # reach up to which a sum over the waves is cheaper than a transform


@torch.no_grad()
def fourier_style(
    source: Tensor,
    target: Tensor,
    *,
    beta: float = 0.01,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Give the source the target's low-frequency amplitudes and keep its phases.

    source: (N, C, H, W), target: (M, C, H', W'), floating point in [0, 1]. In each channel the
    amplitudes of the frequencies |f_y|, |f_x| <= floor(beta * min(H, W)) are replaced; 0 <= beta <=
    0.5, and beta=0 changes the mean alone. Source i is paired with target i mod M, or with a random
    target when `generator` is given; a target of another size is resized first. Returns images of
    the source's shape and dtype, clamped to [0, 1].

    No gradient. Raises ValueError for shapes, devices or a beta that do not fit, TypeError for
    integer images. Source: Yang and Soatto, "FDA: Fourier Domain Adaptation for Semantic
    Segmentation", CVPR 2020.
    """
    arguments.check_between("beta", beta, 0, 0.5)
    paired = _pair(source, target, generator)
    height, width = source.shape[-2:]
    reach = math.floor(beta * min(height, width))

    pixels, target_pixels = source.float(), _resize(paired.float(), (height, width))
    # The wave of two pixels' length is its own conjugate; the sums take it for half of a pair.
    few = reach <= _FEW_WAVES and 2 * reach < min(height, width)
    exchange = _exchange_by_sums if few else _exchange_by_transform
    with torch.autocast(source.device.type, enabled=False):
        styled = exchange(pixels, target_pixels, reach)
    return styled.clamp_(0.0, 1.0).to(source.dtype)


def _exchange_by_sums(source: Tensor, target: Tensor, reach: int) -> Tensor:
    """Source plus the few waves by which its low frequencies change, as small matrix products.

    Three passes over the pixels instead of whole transforms there and back.
    """
    height, width = source.shape[-2:]
    down = _waves(height, torch.arange(reach + 1, device=source.device))  # (H, r + 1)
    across = _waves(width, torch.arange(-reach, reach + 1, device=source.device))  # (W, 2r + 1)
    spectrum = _low_frequencies(source, down, across)  # (N, C, r + 1, 2r + 1)
    amplitude = _low_frequencies(target, down, across).abs()
    change = torch.polar(amplitude, spectrum.angle()) - spectrum
    # A real image holds each wave and its conjugate: the half not written here doubles this one.
    change[..., 1:, :] *= 2
    rows = change @ across.mT / (height * width)  # (N, C, r + 1, W)
    added = torch.cat([rows.real, -rows.imag], dim=-2).flatten(0, 1)
    basis = torch.cat([down.real, down.imag], dim=1).expand(len(added), -1, -1)
    return torch.baddbmm(source.flatten(0, 1), basis, added).view(source.shape)


def _low_frequencies(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """(N, C, r + 1, 2r + 1): the transform at the waves of `down` and `across`."""
    basis = torch.cat([down.real, -down.imag], dim=1).mT
    real, imaginary = (basis @ images).chunk(2, dim=-2)
    return torch.complex(real, imaginary) @ across.conj()


def _waves(length: int, frequencies: Tensor) -> Tensor:
    """exp(2 pi i f x / length), (length, len(frequencies)), complex64."""
    # The product of two integers is reduced exactly, so that large angles keep their digits.
    turns = torch.outer(torch.arange(length, device=frequencies.device), frequencies) % length
    angle = turns.float() * (2 * math.pi / length)
    return torch.polar(torch.ones_like(angle), angle)


def _exchange_by_transform(source: Tensor, target: Tensor, reach: int) -> Tensor:
    height, width = source.shape[-2:]
    spectrum = torch.fft.rfft2(source)  # (N, C, H, W // 2 + 1)
    target_spectrum = torch.fft.rfft2(target)
    # rfft2 keeps the rows of negative frequency at the end and no column of negative frequency.
    for rows in (slice(0, reach + 1), slice(height - reach, height)):
        block = (..., rows, slice(0, reach + 1))
        spectrum[block] = torch.polar(target_spectrum[block].abs(), spectrum[block].angle())
    return torch.fft.irfft2(spectrum, s=(height, width))


@torch.no_grad()
def match_statistics(
    source: Tensor, target: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """Shift and scale each channel of the source to the target's mean and standard deviation.

    source: (N, C, H, W), target: (M, C, H', W'), floating point in [0, 1]; targets are paired with
    sources as in `fourier_style`. Returns images of the source's shape and dtype, clamped to [0,
    1].

    No gradient. Raises ValueError for shapes or devices that do not fit, TypeError for integer
    images. Source: Reinhard et al., "Color Transfer between Images", 2001, here in the images' own
    colour space.
    """
    paired = _pair(source, target, generator)
    _, target_mean, target_std = _centred(paired.float())
    centred, _, source_std = _centred(source.float())
    # A channel flatter than one grey level carries nothing to scale but rounding.
    scale = target_std / source_std.clamp_min(1.0 / 255.0)
    return centred.mul_(scale).add_(target_mean).clamp_(0.0, 1.0).to(source.dtype)


def _centred(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each channel less its mean, the mean, and the standard deviation.

    PyTorch's own std_mean goes one pixel after the other.
    """
    mean = images.mean((-2, -1), keepdim=True)
    centred = images - mean
    return centred, mean, centred.square().mean((-2, -1), keepdim=True).sqrt()


def as_style(style: str | Style | None) -> Style:
    """Return the style of that name: "fourier", "statistics" or "none", which None means as well.

    A callable is returned unchanged. The style "none" returns its source itself, not a copy.
    """
    if style is None:
        return _keep
    if callable(style):
        return style
    if not isinstance(style, str):
        raise TypeError(f"style: got {type(style).__name__}, expected a name, a callable or None")
    arguments.check_choice("style", style, tuple(_STYLES))
    return _STYLES[style]


def _keep(source: Tensor, target: Tensor) -> Tensor:
    return source


_STYLES: dict[str, Style] = {
    "fourier": fourier_style,
    "statistics": match_statistics,
    "none": _keep,
}


def _pair(source: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
    """The target image for each source image, (N, C, H', W')."""
    _check(source, target, generator)
    count = len(source)
    if generator is not None:
        index = torch.randint(len(target), (count,), generator=generator, device=target.device)
    elif count <= len(target):
        return target[:count]
    else:
        index = torch.arange(count, device=target.device) % len(target)
    return target.index_select(0, index)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def _check(source: Tensor, target: Tensor, generator: torch.Generator | None) -> None:
    for name, images in (("source", source), ("target", target)):
        arguments.check_floating(name, images)
        arguments.check_image_shape(name, images)
    if len(target) == 0:
        raise ValueError("target: got no images, expected at least one")
    if source.shape[1] != target.shape[1]:
        raise ValueError(
            f"target: got {target.shape[1]} channels, expected {source.shape[1]} as source"
        )
    arguments.check_device("target", target, source.device)
    arguments.check_generator(generator, source.device)
