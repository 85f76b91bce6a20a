"""The views of a step: source images in the look of the target, and noisy views of the target."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmt.arguments import check_between, check_integer, shape
from fastmt.perturb import class_mix, gaussian_noise, mix, photometric_jitter
from fastmt.style import Style, as_style

_MAX_CLASSES = 4096  # bounds the table of present classes; the loss knows the real number
_SEEDS = -(1 << 63), (1 << 64) - 1  # that PyTorch's generators take
_STRENGTHS = tuple(name for name in photometric_jitter.__kwdefaults__ if name != "generator")


class Viewed(NamedTuple):
    """What student and teacher look at in a step; images (N, C, *spatial)."""

    styled: Tensor
    student: Tensor
    pasted: Tensor | None  # bool (N, *spatial): where the student's view shows the source
    teacher: list[Tensor]  # one view a pass


class Views:
    """Makes the views of each step from its batch, with random numbers of their own.

    The options are those of MeanTeacher.
    """

    def __init__(
        self,
        style: str | Style | None,
        noise: tuple[float, float] | None,
        jitter: Mapping[str, float] | None,
        passes: int,
        class_mixing: float,
        ignore_index: int,
        seed: int,
        device: torch.device,
    ) -> None:
        check_integer("seed", seed)
        check_between("seed", seed, *_SEEDS)
        if noise is not None:
            _check_noise(noise)
        if jitter is not None:
            _check_jitter(jitter)
        self.style = as_style(style)
        self._styles_unit_range = style in ("fourier", "statistics")
        self.noise = (0.0, 0.0) if noise is None else noise
        self.jitter = None if jitter is None else dict(jitter)
        self.passes, self.class_mixing, self.ignore_index = passes, class_mixing, ignore_index
        self.seed = int(seed)
        self.generator = torch.Generator(device).manual_seed(self.seed)

    def of(self, source: Tensor, labels: Tensor, target: Tensor, step: int) -> Viewed:
        """The views of a batch in a step."""
        styled = self.jittered(_check_styled(self.style(source, target), source))
        student = self.noisy(self.jittered(target))
        teacher = [self.noisy(target) for _ in range(self.passes)]
        return Viewed(styled, *self._class_mixed(styled, labels, student, step), teacher)

    def jittered(self, images: Tensor) -> Tensor:
        if self.jitter is None:
            return images
        return photometric_jitter(images, generator=self.generator, **self.jitter)

    def noisy(self, images: Tensor) -> Tensor:
        sigma, clip = self.noise
        return gaussian_noise(images, sigma=sigma, clip=clip, generator=self.generator)

    def _class_mixed(
        self, source: Tensor, labels: Tensor, view: Tensor, step: int
    ) -> tuple[Tensor, Tensor | None]:
        """The student's view with source classes pasted in, and where, bool (N, H, W)."""
        # Drawn on the host from seed and step: a draw on the device would have to be waited for.
        if random.Random(f"{self.seed} {step}").random() >= self.class_mixing:
            return view, None
        pasted = class_mix(
            labels, _MAX_CLASSES, ignore_index=self.ignore_index, generator=self.generator
        )
        return mix(pasted, source, view), pasted

    @contextmanager
    def undrawn_on_error(self) -> Iterator[None]:
        """The random numbers of a step that raises are drawn again by the next one."""
        generators = [self.generator, *_global_generators(self.generator.device)]
        states = [generator.get_state() for generator in generators]
        try:
            yield
        except BaseException:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            raise

    def needs_unit_range(self, styles: bool) -> bool:
        """Whether the images have to lie in [0, 1], in a step that styles its source or not."""
        return self.jitter is not None or (styles and self._styles_unit_range)

    def known(self, labels: Tensor, pasted: Tensor) -> Tensor:
        """The labels of the student's view: the source's where it was pasted, else ignored."""
        fits = labels.dtype != torch.uint8 or 0 <= self.ignore_index <= 255
        return (labels if fits else labels.long()).masked_fill(~pasted, self.ignore_index)


def _global_generators(device: torch.device) -> list[torch.Generator]:
    """Those that dropout in the networks draws from."""
    on_gpu = [torch.cuda.default_generators[device.index]] if device.type == "cuda" else []
    return [torch.default_generator, *on_gpu]


def ignored_label(supervised: Callable[..., Tensor], mixes: bool) -> int:
    """The label that a supervised loss says it ignores; it has to where images are mixed."""
    label = getattr(supervised, "options", {}).get("ignore_index")
    label = getattr(supervised, "ignore_index", label)
    if label is None:
        with suppress(TypeError, ValueError):  # not every callable has a signature
            label = _default(supervised, "ignore_index")
    if label is None and mixes:
        raise ValueError(
            "ignore_index: got None, expected the label that `supervised` ignores, which "
            "class_mixing gives to pixels that the source does not teach"
        )
    return 255 if label is None else label


def _default(function: Callable[..., Any], name: str) -> Any:
    parameter = inspect.signature(function).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _check_noise(noise: tuple[float, float]) -> None:
    fits = isinstance(noise, (tuple, list)) and len(noise) == 2
    if not fits or not all(isinstance(part, Real) and part >= 0 for part in noise):
        raise ValueError(f"noise: got {noise!r}, expected (sigma, clip), two numbers >= 0, or None")


def _check_jitter(jitter: Mapping[str, float]) -> None:
    expected = f"expected a mapping of {', '.join(_STRENGTHS)} to numbers >= 0, or None"
    if not isinstance(jitter, Mapping):
        raise TypeError(f"jitter: got {type(jitter).__name__}, {expected}")
    for name, strength in jitter.items():
        if name not in _STRENGTHS or not isinstance(strength, Real) or not strength >= 0:
            raise ValueError(f"jitter: got {name}={strength!r}, {expected}")
    if jitter.get("greyscale", 0) > 1:
        raise ValueError(f"jitter: got greyscale={jitter['greyscale']}, expected a probability")


def _check_styled(styled: Tensor, source: Tensor) -> Tensor:
    """What a style returned: images of the shape, dtype and device of its source."""
    if not isinstance(styled, Tensor):
        raise TypeError(f"style: returned {type(styled).__name__}, expected a tensor of images")
    kinds = [(images.dtype, images.shape, images.device) for images in (styled, source)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"style: returned {styled.dtype} {shape(styled)} on {styled.device} for a source "
            f"{source.dtype} {shape(source)} on {source.device}, expected the same"
        )
    return styled
