"""What street scenes are made of: the classes, and the materials and lights of each domain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastmt.data.painter import fraction

CLASSES = ("sky", "building", "road", "pavement", "tree", "pole", "car", "person")
SKY, BUILDING, ROAD, PAVEMENT, TREE, POLE, CAR, PERSON = range(len(CLASSES))
Colour = tuple[float, float, float]


def _brick(up: np.ndarray, along: np.ndarray, tone: np.ndarray) -> np.ndarray:
    return -0.10 * (fraction(up * 2.5) < 0.2)


def _plaster(up: np.ndarray, along: np.ndarray, tone: np.ndarray) -> np.ndarray:
    return -0.16 * (fraction(along * 0.8) < 0.12) + 0.22 * (tone - 0.5)


@dataclass(frozen=True)
class Look:
    """Materials and light sources of a domain; colours are reflectances in [0, 1]."""

    relief: Callable
    zenith: Colour
    horizon: Colour
    cloud: Colour
    walls: tuple[Colour, ...]
    pane: Colour
    lit: Colour
    lit_share: float
    road: Colour
    marking: Colour
    pavement: Colour
    kerb: Colour
    slab: float
    joint: float
    grain: float
    patches: float
    shadow: float
    leaves: tuple[Colour, ...]
    leafiness: float
    trunk: Colour
    metal: Colour
    lamp: Colour
    lamp_glow: float
    cars: tuple[Colour, ...]
    head: Colour
    head_glow: float
    tail: Colour
    tail_glow: float
    coats: tuple[Colour, ...]
    trousers: Colour
    visibility: float


LOOKS = {
    "day": Look(
        relief=_brick,
        zenith=(0.33, 0.56, 0.88),
        horizon=(0.78, 0.87, 0.95),
        cloud=(0.97, 0.97, 0.98),
        walls=(
            (0.72, 0.42, 0.33),
            (0.86, 0.76, 0.58),
            (0.78, 0.74, 0.70),
            (0.62, 0.50, 0.42),
            (0.88, 0.84, 0.78),
            (0.56, 0.60, 0.66),
        ),
        pane=(0.24, 0.32, 0.42),
        lit=(0.75, 0.84, 0.92),
        lit_share=0.08,
        road=(0.40, 0.40, 0.42),
        marking=(0.92, 0.92, 0.90),
        pavement=(0.70, 0.67, 0.62),
        kerb=(0.82, 0.81, 0.78),
        slab=1.2,
        joint=0.18,
        grain=0.05,
        patches=0.12,
        shadow=0.38,
        leaves=((0.25, 0.52, 0.18), (0.38, 0.58, 0.20), (0.18, 0.42, 0.20), (0.50, 0.60, 0.24)),
        leafiness=1.0,
        trunk=(0.38, 0.27, 0.18),
        metal=(0.30, 0.33, 0.34),
        lamp=(0.85, 0.86, 0.84),
        lamp_glow=0.0,
        cars=(
            (0.80, 0.12, 0.12),
            (0.14, 0.26, 0.62),
            (0.88, 0.88, 0.90),
            (0.14, 0.14, 0.16),
            (0.60, 0.62, 0.65),
            (0.88, 0.72, 0.16),
            (0.16, 0.44, 0.34),
        ),
        head=(0.95, 0.95, 0.92),
        head_glow=0.0,
        tail=(0.62, 0.06, 0.06),
        tail_glow=0.0,
        coats=(
            (0.82, 0.20, 0.22),
            (0.16, 0.30, 0.66),
            (0.92, 0.80, 0.25),
            (0.92, 0.92, 0.90),
            (0.18, 0.18, 0.20),
            (0.30, 0.60, 0.42),
            (0.64, 0.32, 0.60),
        ),
        trousers=(0.20, 0.24, 0.36),
        visibility=260.0,
    ),
    "dusk": Look(
        relief=_plaster,
        zenith=(0.42, 0.52, 0.78),
        horizon=(1.00, 0.76, 0.62),
        cloud=(0.60, 0.58, 0.66),
        walls=(
            (0.52, 0.48, 0.48),
            (0.64, 0.60, 0.56),
            (0.42, 0.36, 0.36),
            (0.58, 0.48, 0.40),
            (0.46, 0.50, 0.56),
        ),
        pane=(0.20, 0.24, 0.32),
        lit=(1.00, 0.78, 0.42),
        lit_share=0.28,
        road=(0.36, 0.37, 0.40),
        marking=(0.78, 0.78, 0.74),
        pavement=(0.50, 0.48, 0.48),
        kerb=(0.60, 0.60, 0.60),
        slab=0.6,
        joint=0.28,
        grain=0.10,
        patches=0.35,
        shadow=0.15,
        leaves=((0.26, 0.36, 0.18), (0.48, 0.36, 0.16), (0.20, 0.30, 0.20)),
        leafiness=1.7,
        trunk=(0.26, 0.22, 0.20),
        metal=(0.26, 0.26, 0.28),
        lamp=(1.00, 0.86, 0.58),
        lamp_glow=1.0,
        cars=(
            (0.52, 0.12, 0.14),
            (0.16, 0.22, 0.42),
            (0.72, 0.72, 0.74),
            (0.12, 0.12, 0.14),
            (0.46, 0.48, 0.50),
        ),
        head=(1.00, 0.97, 0.86),
        head_glow=1.0,
        tail=(0.95, 0.10, 0.08),
        tail_glow=0.9,
        coats=(
            (0.50, 0.18, 0.20),
            (0.20, 0.26, 0.44),
            (0.66, 0.58, 0.28),
            (0.60, 0.60, 0.62),
            (0.16, 0.16, 0.18),
        ),
        trousers=(0.16, 0.17, 0.24),
        visibility=120.0,
    ),
}
