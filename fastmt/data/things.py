"""What stands in a street, painted by calling it at a depth `z`; lengths in metres."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastmt.data.looks import CAR, PERSON, POLE, TREE, Look
from fastmt.data.painter import Camera, Canvas, pixel_centres, rgb, sign, value_noise, vary

RUBBER = (0.05, 0.05, 0.06)
ARM_SCALE, FLANK_SCALE = 10.0, 5.0  # pixels a metre below which a detail is not drawn
CAR_HEIGHTS = (1.45, 1.5, 1.65, 2.2)


@dataclass(frozen=True)
class Tree:
    x: float

    def __call__(self, canvas: Canvas, camera: Camera, look: Look, rng, z: float) -> None:
        scale, x, foot = camera.focal / z, camera.x(self.x, z), camera.y(0, z)
        stem, radius = rng.uniform(1.8, 3.2), rng.uniform(1.2, 2.6)
        half, r = scale * rng.uniform(0.1, 0.2), scale * radius
        canvas.darken(x, foot, 0.8 * r, scale * 0.25, look.shadow)
        top, trunk = camera.y(stem + 0.6 * radius, z), vary(rng, look.trunk, 0.15)
        canvas.rectangle(x - half, top, x + half, foot, trunk, TREE)
        y = camera.y(stem + radius * rng.uniform(0.6, 0.9), z)
        box = canvas.window(x - 1.4 * r, y - 1.4 * r, x + 1.4 * r, y + 1.2 * r)
        if box is not None:
            self._paint_crown(canvas, box, look, rng, (x, y, r), 1 - math.exp(-z / look.visibility))

    def _paint_crown(self, canvas, box, look: Look, rng, circle, haze: float) -> None:
        x, y, r = circle
        ys, xs = pixel_centres(box)
        dx, dy = (xs - x) / r, (ys - y) / (r * rng.uniform(0.8, 1.15))
        clumps = value_noise(rng, ys.size, xs.size, max(r / 2.5, 1.5))
        leaves = rng.random((ys.size, xs.size), dtype=np.float32)
        inside = dx**2 + dy**2 + (clumps - 0.5) * 1.1 + (leaves - 0.5) * 0.25 < 0.9
        tone = 0.55 + 0.45 * clumps + 0.35 * look.leafiness * leaves - 0.22 * dy
        leaf = vary(rng, look.leaves[rng.integers(len(look.leaves))], 0.15)
        colour = np.zeros((4, ys.size, xs.size), np.float32)
        colour[:3] = rgb(leaf) * (tone * (1 - haze)) + rgb(look.horizon) * haze
        canvas.fill(box, inside, colour, TREE)


@dataclass(frozen=True)
class Pole:
    x: float
    height: float
    lamp: bool

    def __call__(self, canvas: Canvas, camera: Camera, look: Look, rng, z: float) -> None:
        scale, x = camera.focal / z, camera.x(self.x, z)
        half, top, foot = max(scale * 0.07, 0.5), camera.y(self.height, z), camera.y(0, z)
        canvas.rectangle(x - half, top, x + half, foot, look.metal, POLE)
        canvas.rectangle(x - 2 * half, foot - scale * 0.5, x + 2 * half, foot, look.metal, POLE)
        if self.lamp:
            tip = x - sign(self.x) * scale * 1.6
            canvas.rectangle(min(x, tip), top, max(x, tip), top + 1.2 * half, look.metal, POLE)
            head = (tip, top + 1.5 * half, scale * 0.4, scale * 0.16)
            canvas.ellipse(*head, look.lamp, POLE, look.lamp_glow)


@dataclass(frozen=True)
class Car:
    """A car at `x`, seen from behind if it drives `away`, else from the front."""

    x: float
    away: bool

    def __call__(self, canvas: Canvas, camera: Camera, look: Look, rng, z: float) -> None:
        paint = vary(rng, look.cars[rng.integers(len(look.cars))], 0.1)
        half, top = rng.uniform(0.85, 1.0), CAR_HEIGHTS[rng.integers(len(CAR_HEIGHTS))]
        waist, roof = (1.1, 0.92) if top > 2 else (0.9, 0.74)
        scale = camera.focal / z
        canvas.darken(camera.x(self.x, z), camera.y(0, z), scale * 1.35 * half, scale * 0.35, 0.6)
        length = rng.uniform(3.9, 4.8)
        if abs(self.x) > half:
            self._paint_flank(canvas, camera, look, z, length, half, (waist, top, roof), paint)

        def at(x: float, y: float) -> tuple[float, float]:
            return camera.x(self.x + x * half, z), camera.y(y, z)

        def box(x0, y0, x1, y1, colour, glow=0.0) -> None:
            (left, top), (right, bottom) = at(x0, y1), at(x1, y0)
            canvas.rectangle(left, top, right, bottom, colour, CAR, glow)

        def trapezium(low, y0, high, y1, colour) -> None:
            canvas.polygon([at(-low, y0), at(low, y0), at(high, y1), at(-high, y1)], colour, CAR)

        light, glow = (look.tail, look.tail_glow) if self.away else (look.head, look.head_glow)
        trapezium(0.97, waist - 0.05, roof, top, paint)
        trapezium(0.82, waist + 0.04, roof * 0.88, top - 0.12, look.pane)
        box(-0.8, 0.18, 0.8, 0.35, RUBBER)
        box(-1.0, 0.3, 1.0, waist, paint)
        box(-1.0, 0.3, 1.0, 0.44, paint * 0.45)
        for x0, x1 in ((-0.97, -0.68), (0.68, 0.97)):
            box(x0, 0.0, x1, 0.38, RUBBER)
            box(x0, 0.6, x1, 0.78, light, glow)
        plate = (0.85, 0.85, 0.75) if self.away else (0.1, 0.1, 0.11)
        box(-0.35, 0.5, 0.35, 0.64, plate)

    def _paint_flank(self, canvas, camera, look, z, length, half, shape, paint) -> None:
        """The long side that faces the camera, with its windows and wheels."""
        (waist, top, roof), side = shape, -sign(self.x)
        x, x_roof = self.x + side * half, self.x + side * half * roof

        def quad(low, high, bottom, top, colour, x_high=x) -> None:
            corners = [(x, d, bottom) for d in low] + [(x_high, d, top) for d in reversed(high)]
            at = [(camera.x(x, z + d), camera.y(y, z + d)) for x, d, y in corners]
            canvas.polygon(at, colour, CAR)

        quad((0, length), (0, length), 0.25, waist, paint * 0.72)
        quad((0, 0.8 * length), (0, 0.6 * length), waist, top, paint * 0.6, x_roof)
        if camera.focal / z < FLANK_SCALE:
            return
        pane = (0.4, 0.7 * length), (0.4, 0.55 * length), waist, top - 0.15
        quad(*pane, look.pane, x_roof)
        for depth in (z + 0.8, z + length - 0.8):
            half_width = abs(camera.x(x, depth - 0.33) - camera.x(x, depth + 0.33)) / 2
            height = camera.focal * 0.33 / depth
            canvas.ellipse(
                camera.x(x, depth), camera.y(0.32, depth), half_width, height, RUBBER, CAR
            )


@dataclass(frozen=True)
class Person:
    x: float

    def __call__(self, canvas: Canvas, camera: Camera, look: Look, rng, z: float) -> None:
        tall, scale, x = rng.uniform(1.5, 1.9), camera.focal / z, camera.x(self.x, z)
        coat = vary(rng, look.coats[rng.integers(len(look.coats))], 0.2)
        legs, hair = vary(rng, look.trousers, 0.3), vary(rng, (0.16, 0.11, 0.08), 0.5)
        skin = np.array((0.86, 0.66, 0.52)) * rng.uniform(0.45, 1.05)
        stride = rng.uniform(0.04, 0.22)
        canvas.darken(x, camera.y(0, z), scale * 0.4, scale * 0.12, look.shadow)

        def shape(corners, colour) -> None:
            at = [(x + scale * dx, camera.y(tall * up, z)) for dx, up in corners]
            canvas.polygon(at, colour, PERSON)

        for s in (-1, 1):
            foot = s * stride
            shape([(s * 0.18, 0.5), (0, 0.5), (foot - s * 0.07, 0), (foot + s * 0.07, 0)], legs)
            if scale > ARM_SCALE:
                arm = [(s * 0.2, 0.82), (s * 0.1, 0.8), (s * 0.24, 0.45), (s * 0.32, 0.47)]
                shape(arm, coat * 0.8)
        shoulders = [(0.22, 0.82), (0.1, 0.86), (-0.1, 0.86), (-0.22, 0.82)]
        shape([(-0.17, 0.46), (0.17, 0.46), *shoulders], coat)
        head = camera.y(tall * 0.935, z), camera.y(tall * 0.97, z)
        canvas.ellipse(x, head[0], scale * 0.105, scale * tall * 0.075, skin, PERSON)
        canvas.ellipse(x, head[1], scale * 0.1, scale * tall * 0.04, hair, PERSON)
