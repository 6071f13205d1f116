"""Other images in the format of CIFAR-100, on which the driver can be tried without it."""

from __future__ import annotations

import numpy as np

from benchmarks.paper.cifar100.archive import SIDE, Archive, Split
from benchmarks.paper.data import Samples, parts

__all__ = ["as_archive"]


def as_archive(name: str) -> Archive:
    """Put three channels of each image, as bytes, in the middle of 32x32 pixels."""
    train, test = parts(name)
    channels = np.linspace(0, train.x.shape[-1] - 1, 3).astype(int)  # of gray, three times that
    low, high = (bound(train.x[..., channels], axis=(0, 1, 2)) for bound in (np.min, np.max))

    def split(samples: Samples) -> Split:
        x = ((samples.x[..., channels] - low) / (high - low)).clip(0, 1)
        before = (SIDE - x.shape[1]) // 2
        around = (before, SIDE - x.shape[1] - before)
        images = np.pad((255 * x).round().astype(np.uint8), ((0, 0), around, around, (0, 0)))
        return Split(images, samples.y.astype(np.int64))

    return Archive(split(train), split(test), classes=int(train.y.max()) + 1)
