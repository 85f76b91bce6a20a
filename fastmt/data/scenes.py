"""Synthetic street scenes, labelled to the pixel, by day and on a rainy dusk.

Nothing here is photographed: a pinhole camera looks down a random street whose buildings, trees,
poles, cars and people are painted from far to near. Both domains share the distribution of
geometry and differ in texture, light, weather and sensor, so they make a test bed for adaptation
that needs no download. A result on them says little about real streets.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastmt.arguments import check_choice, check_count, check_height_width
from fastmt.data import painter
from fastmt.data.looks import CLASSES, LOOKS, PAVEMENT, ROAD
from fastmt.data.painter import Canvas, rgb
from fastmt.data.street import Street, paint_buildings, paint_ground, paint_sky
from fastmt.pictures import default_palette

MIN_SIZE = 32
Domain = Literal["day", "dusk"]


class Scenes:
    """Data set of `count` rendered street scenes; `ds[i]` is `(image, label)`.

    Images are uint8 (3, H, W), labels uint8 (H, W) or None. They are synthetic, see
    `render_scene`; scene i depends on domain, seed, size and i alone. With `cache` a scene is
    rendered once and its tensors are shared: copy before writing into them.
    """

    def __init__(
        self,
        domain: Domain,
        count: int,
        *,
        seed: int = 0,
        size: tuple[int, int] = (144, 192),
        labelled: bool = True,
        cache: bool = True,
    ) -> None:
        _check_scene(domain, seed, size)
        check_count("count", count)
        self.domain, self.count, self.seed, self.size = domain, count, seed, tuple(size)
        self.labelled, self.cache = labelled, cache
        self.classes = CLASSES
        self.palette = default_palette(len(CLASSES))
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None]:
        index = range(self.count)[index]
        image, label = self._held.get(index) or self._render(index)
        return image, label if self.labelled else None

    def stem(self, index: int) -> str:
        """Name for an item's files, unique among domains and seeds."""
        return f"{self.domain}-{self.seed}-{range(self.count)[index]:05d}"

    def _render(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = render_scene(self.seed, index, domain=self.domain, size=self.size)
        planes = np.ascontiguousarray(image.transpose(2, 0, 1))
        pair = torch.from_numpy(planes), torch.from_numpy(label)
        if self.cache:
            self._held[index] = pair
        return pair


def render_scene(
    seed: int, index: int, *, domain: Domain = "day", size: tuple[int, int] = (144, 192)
) -> tuple[np.ndarray, np.ndarray]:
    """Render a synthetic street scene, the same for the same arguments.

    Args:
        seed: not negative.
        index: number of the scene, not negative.
        domain: "day" is clear daylight; "dusk" is darker, graded blue and orange, with rain, wet
            ground, lit windows and lamps, other materials, sensor noise and vignetting. A day and
            a dusk scene of one seed and index are different streets.
        size: height and width in pixels, each at least 32.

    Returns:
        image uint8 (H, W, 3) and label uint8 (H, W), ids as in `CLASSES`, without void.
    """
    _check_scene(domain, seed, size)
    check_count("index", index, 0)
    rng = np.random.default_rng((seed, index, get_args(Domain).index(domain)))
    look, canvas, street = LOOKS[domain], Canvas(*size), Street(rng, size)
    for paint in (paint_sky, paint_ground, paint_buildings):
        paint(canvas, street, look, rng)
    for depth, paint in street.objects(rng):
        paint(canvas, street.camera, look, rng, depth)
    planes = _light_day(canvas, rng) if domain == "day" else _light_dusk(canvas, rng)
    image = (np.clip(planes, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(image.transpose(1, 2, 0)), canvas.label


def _check_scene(domain: str, seed: int, size: tuple[int, int]) -> None:
    check_choice("domain", domain, get_args(Domain))
    check_count("seed", seed, 0)
    check_height_width("size", size, MIN_SIZE)


def _light_day(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Sunlight of varying strength and warmth, hardly any noise; (3, H, W)."""
    warmth = rng.uniform(-0.04, 0.04)
    sun = rgb((1 + warmth, 1, 1 - warmth)) * rng.uniform(0.88, 1.08)
    noise = rng.standard_normal((3, *canvas.label.shape), dtype=np.float32)
    return canvas.pixels[:3] * sun + noise * 0.008


def _light_dusk(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Little light, much of it emitted; reflections, rain, grading, vignette, noise; (3, H, W)."""
    h, w = canvas.label.shape
    colour, emitted = canvas.pixels[:3], canvas.pixels[3]
    light = colour * emitted
    image = colour * (1 - emitted) * rgb((0.84, 0.90, 1.06)) * rng.uniform(0.7, 1.0) + light
    road, pavement = canvas.label == ROAD, canvas.label == PAVEMENT
    wet = ((0.30 * road + 0.16 * pavement) * rng.uniform(0.6, 1.2)).astype(np.float32)
    image += (painter.wet_reflection(image, road | pavement) - image) * wet
    image += painter.bloom(light, max(w // 24, 2)) * 0.8
    image += painter.rain(rng, h, w, rng.uniform(0.001, 0.005)) * rgb((0.14, 0.15, 0.18))
    image = (image + painter.soften(image)) / 2
    dark = np.clip(1 - 1.6 * image.mean(0), 0, 1)
    image += rgb((0.05, 0.01, -0.06)) + dark * rgb((-0.07, -0.01, 0.12))
    image *= 1 - 0.3 * painter.vignette(h, w)
    noise = rng.standard_normal((3, h, w), dtype=np.float32)
    return image + noise * (0.012 + 0.03 * np.sqrt(np.maximum(image, 0)))
