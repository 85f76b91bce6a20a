"""Painting labelled shapes seen by a pinhole camera, and the weather in front of its lens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Box = tuple[slice, slice]


@dataclass(frozen=True)
class Camera:
    """Pinhole at (0, `height`, 0) metres looking along +Z; X is to the right, Y up from the road.

    `focal`, and the vanishing point (`column`, `row`), are in pixels.
    """

    focal: float
    column: float
    row: float
    height: float

    def x(self, side: float, depth: float) -> float:
        return self.column + self.focal * side / depth

    def y(self, up: float, depth: float) -> float:
        return self.row + self.focal * (self.height - up) / depth

    def side(self, x, depth):
        return (x - self.column) * depth / self.focal


class Canvas:
    """Colour, emitted light and label, painted together from far to near.

    `pixels` is float32 (4, H, W): red, green, blue, and the share of the colour that is emitted
    rather than reflected; `label` is uint8 (H, W). Coordinates are pixels, y downwards.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.pixels = np.zeros((4, height, width), np.float32)
        self.label = np.zeros((height, width), np.uint8)

    def rectangle(self, left, top, right, bottom, colour, label: int, glow: float = 0.0) -> None:
        """Fill at least one pixel each way."""
        x0, y0 = round(left), round(top)
        columns = slice(max(x0, 0), max(round(right), x0 + 1, 0))
        rows = slice(max(y0, 0), max(round(bottom), y0 + 1, 0))
        self.pixels[:, rows, columns] = _paint(colour, glow)
        self.label[rows, columns] = label

    def polygon(self, corners, colour, label: int, glow: float = 0.0) -> None:
        """Fill a convex polygon of (x, y) corners in either orientation."""
        xs, ys = zip(*corners, strict=True)
        box = self.window(min(xs), min(ys), max(xs), max(ys))
        if box is None:
            return
        edges = list(zip(corners, [*corners[1:], corners[0]], strict=True))
        turn = 1 if sum(ax * by - bx * ay for (ax, ay), (bx, by) in edges) > 0 else -1
        # a point is inside where across * x + down * y >= offset for every edge
        lines = [
            (ay - by, bx - ax, ay * (bx - ax) - ax * (by - ay)) for (ax, ay), (bx, by) in edges
        ]
        across, down, offset = turn * np.array(lines, np.float32).T[..., None, None]
        y, x = pixel_centres(box)
        inside = (down * y >= offset - across * x).all(axis=0)
        self.fill(box, inside, _paint(colour, glow), label)

    def ellipse(self, x, y, rx, ry, colour, label: int, glow: float = 0.0) -> None:
        box = self.window(x - rx, y - ry, x + rx, y + ry)
        if box is not None:
            self.fill(box, _reach(box, x, y, rx, ry) <= 1, _paint(colour, glow), label)

    def darken(self, x, y, rx, ry, share: float) -> None:
        """Soft elliptic shadow; labels stay."""
        box = self.window(x - rx, y - ry, x + rx, y + ry)
        if box is not None:
            reach = _reach(box, x, y, rx, ry)
            self.pixels[(slice(3), *box)] *= 1 - share * np.minimum(np.maximum(2 - 2 * reach, 0), 1)

    def fill(self, box: Box, inside: np.ndarray, colour: np.ndarray, label: int) -> None:
        """Paint where `inside` (h, w) holds; `colour` broadcasts to (4, h, w)."""
        np.copyto(self.pixels[(slice(None), *box)], colour, where=inside)
        np.copyto(self.label[box], np.uint8(label), where=inside)

    def window(self, left, top, right, bottom) -> Box | None:
        """Rows and columns of a box clipped to the canvas, None if nothing is left."""
        y0, y1 = max(int(top), 0), min(int(bottom) + 1, self.height)
        x0, x1 = max(int(left), 0), min(int(right) + 1, self.width)
        return (slice(y0, y1), slice(x0, x1)) if y0 < y1 and x0 < x1 else None


def pixel_centres(box: Box) -> tuple[np.ndarray, np.ndarray]:
    """Rows (h, 1) and columns (1, w) of a window's pixel centres, float32."""
    rows, columns = box
    ys = np.arange(rows.start + 0.5, rows.stop, dtype=np.float32)[:, None]
    return ys, np.arange(columns.start + 0.5, columns.stop, dtype=np.float32)[None]


def sign(x: float) -> float:
    """1.0 or -1.0; a Python float keeps float32 arrays float32."""
    return math.copysign(1.0, x)


def fraction(values: np.ndarray) -> np.ndarray:
    """Part after the point; numpy's remainder by 1 costs several times as much."""
    return values - np.floor(values)


def rgb(colour) -> np.ndarray:
    """Colour as float32 (3, 1, 1), to broadcast over pixels."""
    return np.asarray(colour, np.float32).reshape(3, 1, 1)


def vary(rng: np.random.Generator, colour, amount: float) -> np.ndarray:
    """The colour brighter or darker by up to `amount`, each channel a little apart; (3,)."""
    r = rng.random(4, dtype=np.float32) * 2 - 1
    return np.minimum(np.asarray(colour, np.float32) * (1 + amount * (r[0] + 0.3 * r[1:])), 1)


def value_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Smooth noise in [0, 1], float32 (height, width), with bumps of about `cell` pixels."""
    knots = rng.random((int(height / cell) + 2, int(width / cell) + 2), dtype=np.float32)
    rows, columns = (np.arange(n, dtype=np.float32) / np.float32(cell) for n in (height, width))
    return _interpolate(_interpolate(knots, rows, 0), columns, 1)


def soften(image: np.ndarray) -> np.ndarray:
    """Mean with the neighbours above, below, left and right, (3, H, W); edges repeat."""
    p = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    around = p[:, :-2, 1:-1] + p[:, 2:, 1:-1] + p[:, 1:-1, :-2] + p[:, 1:-1, 2:]
    return (around + image) / 5


def bloom(light: np.ndarray, cell: int) -> np.ndarray:
    """Halo of about `cell` pixels around emitted light (3, H, W): block means, interpolated."""
    for axis in (1, 2):
        size = light.shape[axis]
        means = np.add.reduceat(light, range(0, size, cell), axis=axis) / np.float32(cell)
        padded = np.pad(means, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        centres = (np.arange(size, dtype=np.float32) + 0.5) / cell + 0.5
        light = _interpolate(padded, centres, axis)
    return light


def wet_reflection(image: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Image (3, H, W) mirrored in each column about the foot of what stands on the ground."""
    height, width = ground.shape
    rows = np.arange(height)[:, None]
    foot = np.maximum.accumulate(np.where(ground, 0, rows), axis=0)
    mirrored = np.maximum(2 * foot - rows, 0)
    return image.reshape(3, -1).take(mirrored * width + np.arange(width), axis=1)


def rain(rng: np.random.Generator, height: int, width: int, density: float) -> np.ndarray:
    """Slanted streaks, brightness 0 to 1, float32 (height, width)."""
    length = max(height // 14, 3)
    slant = rng.uniform(-0.4, 0.4)
    margin = int(abs(slant) * length) + 1
    drops = rng.random((height + length, width + 2 * margin), dtype=np.float32) / density
    drops[drops > 1] = 0
    streaks = np.zeros((height, width), np.float32)
    for k in range(length):
        left = margin + round(slant * k)
        streaks += drops[length - k : length - k + height, left : left + width]
    return np.minimum(streaks, 1)


@lru_cache(maxsize=8)
def vignette(height: int, width: int) -> np.ndarray:
    """Squared distance from the centre, 0 there and 1 in the corners, float32 (H, W)."""
    ys = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    xs = np.linspace(-1, 1, width, dtype=np.float32)[None]
    return (ys**2 + xs**2) / 2


def _interpolate(grid: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    """Values between grid knots at the positions `at` along one axis.

    Takes and sums, no matrix product: a BLAS would start threads for these few numbers.
    """
    lower = at.astype(np.intp)
    share = (at - lower).reshape([-1 if a == axis else 1 for a in range(grid.ndim)])
    first = grid.take(lower, axis=axis)
    return first + share * (grid.take(lower + 1, axis=axis) - first)


def _reach(box: Box, x, y, rx, ry) -> np.ndarray:
    """Squared distance from (x, y) in radii."""
    ys, xs = pixel_centres(box)
    return ((xs - x) / max(rx, 0.5)) ** 2 + ((ys - y) / max(ry, 0.5)) ** 2


def _paint(colour, glow: float) -> np.ndarray:
    return np.array((*colour, glow), np.float32).reshape(4, 1, 1)
