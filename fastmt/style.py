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

Style = Callable[[Tensor, Tensor], Tensor]

__all__ = ["Style", "as_style", "fourier_style", "match_statistics"]


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
    if not 0.0 <= beta <= 0.5:
        raise ValueError(f"beta must be in [0, 0.5], got {beta}")
    paired = _pair(source, target, generator)
    height, width = source.shape[-2:]
    reach = math.floor(beta * min(height, width))

    spectrum = torch.fft.rfft2(source.float())  # (N, C, H, W // 2 + 1)
    target_spectrum = torch.fft.rfft2(_resize(paired.float(), (height, width)))
    # rfft2 keeps the rows of negative frequency at the end and no column of negative frequency.
    for rows in (slice(0, reach + 1), slice(height - reach, height)):
        block = (..., rows, slice(0, reach + 1))
        spectrum[block] = torch.polar(target_spectrum[block].abs(), spectrum[block].angle())
    styled = torch.fft.irfft2(spectrum, s=(height, width))
    return styled.clamp(0.0, 1.0).to(source.dtype)


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
    paired = _pair(source, target, generator).float()
    pixels = source.float()
    source_std, source_mean = torch.std_mean(pixels, dim=(-2, -1), correction=0, keepdim=True)
    target_std, target_mean = torch.std_mean(paired, dim=(-2, -1), correction=0, keepdim=True)
    # A channel flatter than one grey level carries nothing to scale but rounding.
    scale = target_std / source_std.clamp_min(1.0 / 255.0)
    styled = (pixels - source_mean) * scale + target_mean
    return styled.clamp(0.0, 1.0).to(source.dtype)


def as_style(style: str | Style | None) -> Style:
    """Return the style of that name: "fourier", "statistics" or "none", which None means as well.

    A callable is returned unchanged. The style "none" returns its source itself, not a copy.
    """
    if style is None:
        return _keep
    if callable(style):
        return style
    if not isinstance(style, str):
        raise TypeError(f"style must be a name, a callable or None, got {type(style).__name__}")
    if style not in _STYLES:
        raise ValueError(f"style must be one of {', '.join(map(repr, _STYLES))}, got {style!r}")
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
        if not images.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {images.dtype}")
        if images.ndim != 4:
            raise ValueError(f"{name} must have shape (N, C, H, W), got {tuple(images.shape)}")
    if len(target) == 0:
        raise ValueError("target must hold at least one image, got none")
    if source.shape[1] != target.shape[1]:
        raise ValueError(
            f"target must have the source's {source.shape[1]} channels, got {target.shape[1]}"
        )
    if source.device != target.device:
        raise ValueError(f"target must be on {source.device} like source, got {target.device}")
    if generator is not None and generator.device.type != source.device.type:
        raise ValueError(
            f"generator must be on the images' device {source.device}, got {generator.device}"
        )
