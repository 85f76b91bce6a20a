"""A random street: its geometry, ground and houses; lengths in metres, `z` is the depth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastmt.data.looks import BUILDING, PAVEMENT, ROAD, SKY, Look
from fastmt.data.painter import (
    Camera,
    Canvas,
    fraction,
    pixel_centres,
    rgb,
    sign,
    value_noise,
    vary,
)
from fastmt.data.things import Car, Person, Pole, Tree

Placed = list[tuple[float, Callable]]


class Street:
    """A camera, a roadway between kerbs, two pavements, and what stands there."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        height, width = size
        self.camera = Camera(
            focal=width * rng.uniform(0.65, 1.05),
            column=width * rng.uniform(0.28, 0.72),
            row=height * rng.uniform(0.40, 0.56),
            height=rng.uniform(1.3, 2.1),
        )
        self.kerbs = (-rng.uniform(2.8, 7.0), rng.uniform(2.8, 7.0))
        self.fronts = tuple(k + sign(k) * rng.uniform(1.6, 5.5) for k in self.kerbs)
        self.drive_side = sign(rng.uniform(-1, 1))
        self.shaded_side = sign(rng.uniform(-1, 1))
        self.openness = rng.uniform(0.0, 0.6)

    def objects(self, rng: np.random.Generator) -> Placed:
        """(depth, painter) of everything that stands on the ground, far to near."""
        placed = [*self._cars(rng), *self._trees(rng), *self._poles(rng), *self._people(rng)]
        return sorted(placed, key=lambda item: -item[0])

    def _cars(self, rng: np.random.Generator) -> Placed:
        placed: Placed = []
        for side, kerb in zip((-1, 1), self.kerbs, strict=True):
            away = side == self.drive_side
            if rng.random() < 0.75:
                for z in _spread(rng, rng.uniform(6, 20), 60, 8, 30):
                    placed.append((z, Car(kerb * rng.uniform(0.4, 0.5), away)))
            if abs(kerb) > 4.6 and rng.random() < 0.7:
                for z in _spread(rng, rng.uniform(4, 14), 45, 5.5, 16):
                    placed.append((z, Car(kerb - side * 1.05, away)))
        return placed

    def _trees(self, rng: np.random.Generator) -> Placed:
        placed: Placed = []
        for kerb, front in zip(self.kerbs, self.fronts, strict=True):
            if rng.random() < 0.65:
                x = kerb + (front - kerb) * rng.uniform(0.3, 0.9)
                for z in _spread(rng, rng.uniform(5, 16), 70, 6, 20):
                    placed.append((z, Tree(x + rng.normal(0, 0.2))))
            for z in _spread(rng, rng.uniform(14, 40), 90, 10, 40):
                placed.append((z, Tree(front)))
        return placed

    def _poles(self, rng: np.random.Generator) -> Placed:
        placed: Placed = []
        for kerb in self.kerbs:
            if rng.random() < 0.85:
                lamp = rng.random() < 0.7
                height = rng.uniform(5, 8) if lamp else rng.uniform(2.5, 6)
                pole = Pole(kerb + sign(kerb) * 0.4, height, lamp)
                placed += [(z, pole) for z in _spread(rng, rng.uniform(4, 11), 55, 7, 18)]
        return placed

    def _people(self, rng: np.random.Generator) -> Placed:
        placed: Placed = []
        for _ in range(rng.integers(1, 9)):
            side = rng.integers(2)
            pavement = sorted((self.kerbs[side], self.fronts[side]))
            x = rng.uniform(*(pavement if rng.random() < 0.8 else self.kerbs))
            placed.append((rng.uniform(4.5, 28), Person(x)))
        return placed


def _spread(rng: np.random.Generator, z: float, end: float, least: float, most: float):
    """Depths from `z` to `end` with random gaps."""
    while z < end:
        yield z
        z += rng.uniform(least, most)


def paint_sky(canvas: Canvas, street: Street, look: Look, rng: np.random.Generator) -> None:
    h, w = canvas.label.shape
    up = np.maximum(1 - np.arange(h, dtype=np.float32)[:, None] / np.float32(street.camera.row), 0)
    cloud = value_noise(rng, h, w, w / 6) * 0.65 + value_noise(rng, h, w, w / 16) * 0.35
    cover = np.clip((cloud - rng.uniform(0.35, 0.75)) * 4, 0, 1) * (0.3 + 0.7 * up)
    sky = rgb(look.horizon) + (rgb(look.zenith) - rgb(look.horizon)) * up
    canvas.pixels[:3] = sky + (rgb(look.cloud) - sky) * cover
    canvas.label[:] = SKY


def paint_ground(canvas: Canvas, street: Street, look: Look, rng: np.random.Generator) -> None:
    """Roadway with markings between the kerbs, slabs beyond; detail fades with depth."""
    camera, (left, right) = street.camera, street.kerbs
    box = canvas.window(0, np.ceil(camera.row), canvas.width, canvas.height)
    ys, xs = pixel_centres(box)
    z = camera.focal * camera.height / np.maximum(ys - camera.row, 0.25)
    x = camera.side(xs, z)
    near = np.maximum(1 - z / 40, 0)
    road = (x > left) & (x < right)
    dash = (np.abs(x - (left + right) / 2) < 0.09) & (fraction(z / 6 + rng.random()) < 0.5)
    line = road & (dash | (np.abs(x - left - 0.3) < 0.06) | (np.abs(x - right + 0.3) < 0.06))
    kerb = ~road & (x > left - 0.16) & (x < right + 0.16)
    joint = ~road & ~kerb & (np.minimum(fraction(x / look.slab), fraction(z / look.slab)) < 0.08)
    grain = rng.standard_normal(x.shape, dtype=np.float32) * look.grain
    patches = value_noise(rng, *x.shape, canvas.width / 12) - 0.5
    tone = (1 + grain * near + look.patches * patches) * (1 - look.joint * joint * near)
    ground = vary(rng, look.road, 0.1), vary(rng, look.pavement, 0.1)
    colour = np.where(road, rgb(ground[0]), rgb(ground[1])) * tone
    np.copyto(colour, rgb(look.marking), where=line)
    np.copyto(colour, rgb(look.kerb), where=kerb)
    edge = 0.6 * (right if street.shaded_side > 0 else -left)
    canvas.pixels[(slice(3), *box)] = colour * (1 - look.shadow * (x * street.shaded_side > edge))
    canvas.label[box] = np.where(road, ROAD, PAVEMENT)


def paint_buildings(canvas: Canvas, street: Street, look: Look, rng: np.random.Generator) -> None:
    """A skyline across the end of the street, then both rows of houses from far to near."""
    camera = street.camera
    x, end = camera.side(0, 120), camera.side(canvas.width, 120)
    while x < end:
        width = rng.uniform(12, 36)
        if rng.random() < 0.8:
            house = House(rng, look, rng.uniform(6, 26))
            house.paint_front(canvas, camera, look, x, x + width, rng.uniform(100, 130))
        else:
            for at in range(round(x), round(x + width), 7):
                Tree(float(at))(canvas, camera, look, rng, 120.0)
        x += width
    for front in street.fronts:
        _paint_row(canvas, street, look, rng, front)


def _paint_row(canvas: Canvas, street: Street, look: Look, rng, front: float) -> None:
    side, lots, z = sign(front), [], rng.uniform(-6, 2)
    while z < 85:
        length = rng.uniform(9, 26)
        if rng.random() >= street.openness:
            lots.append((z, z + length))
        z += length + (rng.uniform(2, 9) if rng.random() < street.openness else 0)
    shade = 0.75 if side == street.shaded_side else 1.0
    for near, far in reversed(lots):
        house = House(rng, look, rng.uniform(2.9, 3.6) * int(rng.integers(1, 7)) + 1.5)
        x = front + side * max(rng.uniform(-3.0, 1.5), 0.0)
        house.paint_side(canvas, street.camera, look, x, near, far, shade)
        if near > 1:
            back = x + side * rng.uniform(8, 20)
            house.paint_front(canvas, street.camera, look, x, back, near)


class House:
    """Walls with rows of windows."""

    def __init__(self, rng: np.random.Generator, look: Look, height: float) -> None:
        self.height = height
        self.wall = vary(rng, look.walls[rng.integers(len(look.walls))], 0.12)
        self.trim = self.wall * rng.uniform(0.55, 1.25)
        self.pitch, self.storey = rng.uniform(1.8, 3.4), rng.uniform(2.9, 3.6)
        self.pane = rng.uniform(0.18, 0.37), rng.uniform(0.2, 0.35)  # half extents
        self.tones = rng.random(128, dtype=np.float32)
        self.shop = rng.random() < 0.4

    def paint_side(self, canvas, camera, look, x, near: float, far: float, shade: float) -> None:
        """Wall along the street at `x`, between two depths."""
        near = max(near, 0.6)
        if far <= near:
            return
        box = self._box(canvas, camera, camera.x(x, near), camera.x(x, far), near)
        if box is None:
            return
        ys, xs = pixel_centres(box)
        z = np.clip(camera.focal * x / (xs - camera.column), near, far)
        self._paint(canvas, box, camera, look, ys, z, z, shade)

    def paint_front(self, canvas, camera, look, x0: float, x1: float, z: float) -> None:
        """Wall across the view between two sides."""
        box = self._box(canvas, camera, camera.x(x0, z), camera.x(x1, z), z)
        if box is not None:
            ys, xs = pixel_centres(box)
            along = camera.side(xs, z).astype(np.float32)
            self._paint(canvas, box, camera, look, ys, np.full_like(xs, z), along, 0.88)

    def _box(self, canvas, camera, x0: float, x1: float, near: float):
        left, right = sorted((round(x0), round(x1)))
        if right <= left:
            return None
        return canvas.window(left, camera.y(self.height, near), right - 1, camera.y(0, near))

    def _paint(self, canvas, box, camera, look: Look, ys, z, along, shade: float) -> None:
        up = camera.height - (ys - camera.row) * (z / camera.focal)
        u, v = along / self.pitch, up / self.storey
        across, floor = np.abs(fraction(u) - 0.5), np.floor(v)
        window = (across < self.pane[0]) & (np.abs(v - floor - 0.55) < self.pane[1])
        if self.shop:
            glass = (across < 0.42) & (up > 0.5) & (v < 0.8)
            window = np.where(v < 1, glass, window)
        window &= up < self.height - 0.9
        tone = self.tones[(np.floor(u).astype(np.int32) * 31 + floor.astype(np.int32) * 17) & 127]
        relief = 1 + look.relief(up, along, tone) * np.maximum(1 - z / 35, 0)
        haze = 1 - np.exp(-z / look.visibility)
        colour = np.empty((4, *up.shape), np.float32)
        colour[:3] = np.where(up < self.height - 0.7, rgb(self.wall) * relief, rgb(self.trim))
        np.copyto(colour[:3], rgb(look.pane) * (0.6 + 0.8 * tone), where=window)
        colour[:3] *= shade * (1 - haze)
        colour[:3] += rgb(look.horizon) * haze
        colour[3] = 0
        lit = window & (tone < look.lit_share)
        np.copyto(colour, np.array((*look.lit, 0.85), np.float32).reshape(4, 1, 1), where=lit)
        canvas.fill(box, (up >= 0) & (up <= self.height), colour, BUILDING)
