"""The residual networks of He et al. (2016) for images of 32x32, as the authors of GC have them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["RESNET_50", "ResNet"]

RESNET_50 = (3, 4, 6, 3)  # blocks of a stage

_EXPANSION = 4


class ResNet(nn.Sequential):
    """A stem of 3x3 without pooling, and stages of bottlenecks, each half as large as the last."""

    def __init__(self, blocks: tuple[int, ...], width: int, classes: int) -> None:
        layers = [_convolution(3, width), nn.ReLU()]
        inputs = width
        for stage, count in enumerate(blocks):
            inside = width * 2**stage
            for block in range(count):
                stride = 2 if stage and not block else 1
                layers.append(_Bottleneck(inputs, inside, stride))
                inputs = _EXPANSION * inside
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)
        super().__init__(*layers, *head)


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, inside: int, stride: int) -> None:
        super().__init__()
        outputs = _EXPANSION * inside
        self.body = nn.Sequential(
            _convolution(inputs, inside, size=1),
            nn.ReLU(),
            _convolution(inside, inside, stride=stride),
            nn.ReLU(),
            _convolution(inside, outputs, size=1),
        )
        fits = inputs == outputs and stride == 1
        self.past = nn.Identity() if fits else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.past(x))


def _convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))
