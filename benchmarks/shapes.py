"""The shapes that are measured."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple


class Shape(NamedTuple):
    """Logits (batch, classes, *spatial)."""

    batch: int
    classes: int
    spatial: tuple[int, ...]

    @property
    def dims(self) -> tuple[int, ...]:
        return (self.batch, self.classes, *self.spatial)

    @property
    def pixels(self) -> int:
        total = self.batch
        for length in self.spatial:
            total *= length
        return total

    def lowered(self, factor: int) -> Shape:
        """The logits of a network that stops at 1/factor of the resolution."""
        return self._replace(spatial=tuple(-(-length // factor) for length in self.spatial))

    def __str__(self) -> str:
        return "x".join(map(str, self.dims))


HEADLINE = Shape(2, 19, (512, 512))
LARGE = (
    Shape(2, 19, (1024, 1024)),
    Shape(4, 19, (801, 801)),
    Shape(16, 21, (512, 512)),
    Shape(4, 150, (512, 512)),
    Shape(2, 2, (112, 112, 80)),
)
UPSAMPLED = (  # logits at 1/stride of this output
    (Shape(2, 19, (512, 512)), 8),
    (Shape(2, 19, (1024, 1024)), 8),
    (Shape(4, 150, (512, 512)), 8),
)
UPSAMPLED_VOLUMES = ((Shape(2, 2, (112, 112, 80)), 4), (Shape(2, 14, (96, 96, 96)), 4))
SIDES = (256, 512, 1024, 2048)  # of the images over which time and memory are followed
CROSSOVER = tuple(Shape(1, 19, (side, side)) for side in (16, 32, 64, 128))
TINY, TINY_VOLUME = Shape(2, 3, (9, 11)), Shape(2, 3, (4, 6, 5))

MANY_SMALL = ((64, 16),) * 1000


def unet_parameters(classes: int = 19) -> tuple[tuple[int, ...], ...]:
    """Parameter shapes of the 31 M parameter U-Net: 64 to 1024 channels, batch norm.

    Source: Ronneberger et al., "U-Net", MICCAI 2015.
    """
    shapes: list[tuple[int, ...]] = []

    def two_convolutions(channels_in: int, channels: int) -> None:
        for before in (channels_in, channels):
            shapes.extend([(channels, before, 3, 3), (channels,), (channels,)])

    channels = (3, 64, 128, 256, 512, 1024)
    for before, after in pairwise(channels):
        two_convolutions(before, after)
    for wide in channels[:1:-1]:
        shapes.extend([(wide, wide // 2, 2, 2), (wide // 2,)])
        two_convolutions(wide, wide // 2)
    return (*shapes, (classes, 64, 1, 1), (classes,))


def resnet50_parameters() -> tuple[tuple[int, ...], ...]:
    """Parameter shapes of ResNet-50, 25.6 M in 161 tensors.

    Source: He et al., "Deep Residual Learning", CVPR 2016.
    """
    shapes: list[tuple[int, ...]] = []

    def convolution(before: int, after: int, side: int) -> None:
        shapes.extend([(after, before, side, side), (after,), (after,)])

    convolution(3, 64, 7)
    before = 64
    for narrow, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(before, narrow, 1)
            convolution(narrow, narrow, 3)
            convolution(narrow, 4 * narrow, 1)
            if block == 0:
                convolution(before, 4 * narrow, 1)
            before = 4 * narrow
    return (*shapes, (1000, before), (1000,))


def vit_large_parameters() -> tuple[tuple[int, ...], ...]:
    """Parameter shapes of ViT-L/16 at 224 pixels, 304 M in 296 tensors.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.
    """
    width, depth, patches = 1024, 24, (224 // 16) ** 2
    linear = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    norm = [(width,), (width,)]
    block = [*norm, *norm, *(shape for wide in linear for shape in (wide, wide[:1]))]
    stem = [(1, 1, width), (1, patches + 1, width), (width, 3, 16, 16), (width,)]
    return (*stem, *block * depth, *norm, (1000, width), (1000,))


def segformer_b5_parameters() -> tuple[tuple[int, ...], ...]:
    """Parameter shapes of SegFormer-B5, 84.6 M in 1065 tensors at 19 classes.

    Source: Xie et al., "SegFormer", NeurIPS 2021.
    """
    shapes: list[tuple[int, ...]] = []

    def weighted(*shape: int) -> None:
        shapes.extend([shape, shape[:1]])

    before = 3
    for width, depth, ratio, side in (
        (64, 3, 8, 7),
        (128, 6, 4, 3),
        (320, 40, 2, 3),
        (512, 3, 1, 3),
    ):
        weighted(width, before, side, side)
        norms = [(width,), (width,)]
        shapes.extend(norms)
        for _ in range(depth):
            shapes.extend(norms * 2)
            weighted(width, width)  # query
            weighted(2 * width, width)  # key and value
            weighted(width, width)
            if ratio > 1:
                weighted(width, width, ratio, ratio)
                shapes.extend(norms)
            weighted(4 * width, width)
            weighted(4 * width, 1, 3, 3)
            weighted(width, 4 * width)
        shapes.extend(norms)
        before = width
    for width in (64, 128, 320, 512):
        weighted(768, width)
    shapes.extend([(768, 4 * 768, 1, 1), (768,), (768,)])
    weighted(19, 768, 1, 1)
    return tuple(shapes)
