"""Networks whose parameters and buffers are averaged; none is ever run."""

from __future__ import annotations

from torch import nn


class Bottleneck(nn.Module):
    def __init__(self, before: int, narrow: int, *, first: bool) -> None:
        super().__init__()
        wide = 4 * narrow
        self.conv1 = nn.Conv2d(before, narrow, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = nn.Conv2d(narrow, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU()
        if first:
            shortcut = nn.Conv2d(before, wide, 1, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(wide))


class ResNet50(nn.Module):
    """ResNet-50's modules: 161 parameters and 159 buffers, 25.6 M values at `width` 64.

    Source: He et al., "Deep Residual Learning", CVPR 2016.
    """

    def __init__(self, width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3)
        before = width
        for stage, blocks in enumerate((3, 4, 6, 3)):
            layer = nn.Sequential()
            for block in range(blocks):
                layer.append(Bottleneck(before, width << stage, first=block == 0))
                before = 4 * width << stage
            self.add_module(f"layer{stage + 1}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, classes)
