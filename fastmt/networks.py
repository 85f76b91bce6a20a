"""A small segmentation network that trains on a laptop."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmt import arguments

__all__ = ["UNet"]

_OUTPUT_STRIDES = (2, 4, 8, 16)


class UNet(nn.Module):
    """U-Net with a strided encoder down to 1/32 and a decoder back up to 1/`stride` resolution.

    The stem halves the resolution at once and the decoder stops early, so that no layer works at
    full resolution; the loss is meant to up-sample the logits itself.

    num_classes: classes C, hence logit channels; in_channels: image channels; width: channels at
    1/4 resolution, an even number; stride: 2, 4, 8 or 16, input pixels per logit pixel.

    forward: images (N, in_channels, H, W), floating point, any H, W >= 16 -> logits (N, C, ceil(H /
    stride), ceil(W / stride)). In training mode a batch of a single image needs H or W > 32,
    because batch statistics want more than one value per channel.

    Source: Ronneberger et al., "U-Net", MICCAI 2015, with strided convolutions in place of pooling.
    """

    def __init__(
        self, num_classes: int, *, in_channels: int = 3, width: int = 32, stride: int = 4
    ) -> None:
        super().__init__()
        arguments.check_count("num_classes", num_classes)
        arguments.check_count("in_channels", in_channels)
        arguments.check_index("width", width)
        if width < 2 or width % 2:
            raise ValueError(f"width: got {width}, expected an even number of at least 2")
        arguments.check_choice("stride", stride, _OUTPUT_STRIDES)
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.stride = stride

        channels = [width // 2, width, 2 * width, 4 * width, 4 * width]  # at 1/2, 1/4, ... 1/32
        self.stem = _ConvNormReLU(in_channels, channels[0], stride=2)
        self.encoder = nn.ModuleList(
            _Stage(before, after, stride=2) for before, after in pairwise(channels)
        )
        skips = channels[_OUTPUT_STRIDES.index(stride) : -1][::-1]  # coarse to fine
        self.decoder = nn.ModuleList(
            _Stage(coarse + skip, skip) for coarse, skip in pairwise([channels[-1], *skips])
        )
        self.head = nn.Conv2d(skips[-1], num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        arguments.check_image_shape("images", images, self.in_channels)
        features = [self.stem(images)]
        for stage in self.encoder:
            features.append(stage(features[-1]))
        decoded = features.pop()
        for stage in self.decoder:
            skip = features.pop()
            coarse = F.interpolate(decoded, skip.shape[-2:], mode="bilinear", align_corners=False)
            decoded = stage(torch.cat([coarse, skip], dim=1))
        return self.head(decoded)


class _ConvNormReLU(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class _Stage(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(
            _ConvNormReLU(in_channels, out_channels, stride),
            _ConvNormReLU(out_channels, out_channels),
        )
