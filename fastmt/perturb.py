"""Perturbations: the noisy views that student and teacher look at, and class-wise mixing.

Every function returns new tensors, takes float16, bfloat16 and float32 images, stays on the device
without waiting for it, and draws from `generator` (of the images' device) when one is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmt import arguments, backends, reference

__all__ = ["class_mix", "gaussian_noise", "mix", "photometric_jitter"]

_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, Rec. 601


def gaussian_noise(
    images: Tensor,
    *,
    sigma: float = 0.1,
    clip: float = 0.2,
    clamp: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return `images + clip(sigma * eps, -clip, clip)`, `eps` standard normal and drawn per value.

    images: floating point, any shape; sigma and clip are in the images' unit (default: images in
    [0, 1]). The result has the shape, dtype and memory layout of `images`. It may leave [0, 1]:
    cutting it there would turn the noise one-sided in black and in saturated regions. `clamp=True`
    cuts it nonetheless.

    On CPU the noise of an element follows from one draw of `generator` and the element's place in
    memory, whatever the number of threads; on GPU it is PyTorch's own.

    Differentiable in `images`. Raises TypeError for integer images, ValueError for negative sigma
    or clip. Source: Yu et al., "Uncertainty-aware Self-ensembling Model", MICCAI 2019.
    """
    arguments.check_floating("images", images)
    arguments.check_at_least("sigma", sigma, 0)
    arguments.check_at_least("clip", clip, 0)
    arguments.check_flag("clamp", clamp)
    arguments.check_generator(generator, images.device)
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        return _noise_of_torch(images, sigma, clip, clamp, generator)
    wants_gradient = images.requires_grad and torch.is_grad_enabled()
    obstacle = "images require a gradient" if wants_gradient else None
    choice = backends.choose("gaussian_noise", [images], obstacle=obstacle)
    seed = torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator)
    if choice.backend == "eager":
        return reference.gaussian_noise(images, seed, sigma, clip, clamp)
    return torch.ops.fastmt.gaussian_noise(images, seed, sigma, clip, clamp)


def _noise_of_torch(
    images: Tensor, sigma: float, clip: float, clamp: bool, generator: torch.Generator | None
) -> Tensor:
    noise = torch.empty_like(images, requires_grad=False).normal_(generator=generator)
    noisy = noise.mul_(sigma).clamp_(-clip, clip).add_(images)
    return noisy.clamp(0.0, 1.0) if clamp else noisy


def photometric_jitter(
    images: Tensor,
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    greyscale: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Change brightness, contrast and saturation of each image by random factors; no pixel moves.

    images: (N, 3, H, W), red green blue in [0, 1]. Each strength s draws one factor per image,
    uniform in [max(0, 1 - s), 1 + s]. Brightness multiplies; contrast scales about the image's mean
    luminance; saturation scales about each pixel's luminance; `greyscale` is the probability that
    an image loses its colour altogether. The result has the shape and dtype of `images` and is
    clamped to [0, 1].

    Computed in float32, differentiable in `images`. Raises TypeError for integer images, ValueError
    for another shape, a negative strength or a probability outside [0, 1].
    """
    arguments.check_floating("images", images)
    arguments.check_image_shape("images", images, 3)
    arguments.check_at_least("brightness", brightness, 0)
    arguments.check_at_least("contrast", contrast, 0)
    arguments.check_at_least("saturation", saturation, 0)
    arguments.check_between("greyscale", greyscale, 0, 1)
    arguments.check_generator(generator, images.device)

    draws = torch.rand((4, len(images), 1, 1), device=images.device, generator=generator)
    gain = _factor(brightness, draws[0])
    scale = _factor(contrast, draws[1]) * gain
    colour = _factor(saturation, draws[2]) * (draws[3] >= greyscale)

    # Three linear steps whose luminance weights sum to 1 collapse into one matrix and one shift.
    pixels = images.float().flatten(2)  # (N, 3, P)
    luma = torch.cat([pixels.new_full((1,), share) for share in _LUMA])
    matrix = colour * scale * torch.eye(3, device=images.device) + (1.0 - colour) * scale * luma
    with torch.autocast(images.device.type, enabled=False):
        shift = (gain - scale) * (pixels.mean(2) @ luma).view(-1, 1, 1)
        jittered = torch.baddbmm(shift.expand_as(pixels), matrix, pixels).view(images.shape)
    return jittered.clamp(0.0, 1.0).to(images.dtype)


def class_mix(
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: int = 255,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a mask of the pixels of a random half of the classes in each label map, for `mix`.

    labels: (N, H, W) or (N, *spatial), integer. Half of the classes present in each label map,
    rounded up, are drawn without replacement; the mask (bool, shape of `labels`) is True on their
    pixels and False on all others, `ignore_index` included. No gradient.

    Raises TypeError for labels that are not integer, ValueError for num_classes < 1 and, on CPU,
    for a label outside [0, num_classes) that is not `ignore_index`; on GPU, and in a compiled
    function, such a pixel counts as ignored. Sources: Olsson et al., "ClassMix", WACV 2021;
    Tranheden et al., "DACS", WACV 2021.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: got {labels.dtype}, expected integers")
    if labels.ndim < 2:
        raise ValueError(f"labels: got shape {arguments.shape(labels)}, expected (N, *spatial)")
    arguments.check_count("num_classes", num_classes)
    arguments.check_index("ignore_index", ignore_index)
    arguments.check_generator(generator, labels.device)

    label = labels.long().flatten(1)  # (N, P)
    in_range = (label >= 0) & (label < num_classes)
    ignored = label == ignore_index
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(label, in_range | ignored, num_classes, ignore_index)
    column = torch.where(in_range & ~ignored, label, num_classes)

    # One column more than classes collects the ignored pixels; it is never present and never drawn.
    present = torch.zeros(len(label), num_classes + 1, dtype=torch.bool, device=label.device)
    present = present.scatter(1, column, True)
    present[:, num_classes] = False
    draws = torch.rand(present.shape, device=label.device, generator=generator)
    rank = draws.masked_fill(~present, 2.0).argsort(dim=1).argsort(dim=1)
    half = (present.sum(dim=1, keepdim=True) + 1) // 2
    return (present & (rank < half)).gather(1, column).view(labels.shape)


def mix(mask: Tensor, pasted: Tensor, base: Tensor) -> Tensor:
    """Return `pasted` where `mask` is True and `base` elsewhere.

    mask: bool (N, *spatial); pasted, base: images (N, C, *spatial) or label maps (N, *spatial),
    equal in shape and dtype. Differentiable in `pasted` and `base`. Raises TypeError or ValueError
    for what does not fit.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got {mask.dtype}, expected bool")
    if pasted.dtype != base.dtype:
        raise TypeError(f"pasted: got {pasted.dtype}, expected {base.dtype} as base")
    if pasted.shape != base.shape:
        raise ValueError(
            f"pasted: got shape {arguments.shape(pasted)}, expected {arguments.shape(base)} as base"
        )
    if mask.shape == base.shape:
        return torch.where(mask, pasted, base)
    if mask.shape != base.shape[:1] + base.shape[2:]:
        raise ValueError(
            f"mask: got shape {arguments.shape(mask)}, expected (N, *spatial) of base "
            f"{arguments.shape(base)}"
        )
    return torch.where(mask.unsqueeze(1), pasted, base)


def _factor(strength: float, draw: Tensor) -> Tensor:
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    return low + (high - low) * draw


def _check_range(label: Tensor, known: Tensor, num_classes: int, ignore_index: int) -> None:
    if not known.all():
        wrong = int(label[~known][0])
        raise ValueError(arguments.label_message(wrong, num_classes, ignore_index))
