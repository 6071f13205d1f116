"""Batches of images, cropped and flipped at random and normalized, on the device they lie on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor
from torch.nn import functional

from benchmarks.paper.cifar100.archive import SIDE

__all__ = ["batches", "normalized", "padded"]

PADDING = 4
# Of the red, green and blue in all images, as the authors round them.
MEAN = (0.507, 0.487, 0.441)
DEVIATION = (0.267, 0.256, 0.276)


def padded(images: Tensor) -> Tensor:
    """Surround images, shape (n, 32, 32, 3), with black, on all sides."""
    return functional.pad(images, (0, 0, *4 * (PADDING,)))


def batches(
    images: Tensor, labels: Tensor, size: int, generator: Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Go once through `padded` images in random order; those left at the end are dropped.

    All is drawn at the start, and on the CPU: equal states of the generator give equal batches,
    whatever the device, and whatever is done with them.
    """
    n = len(images)
    order = torch.randperm(n, generator=generator)
    corners = torch.randint(2 * PADDING + 1, (2, n), generator=generator)
    flips = torch.randint(2, (n,), generator=generator).bool()
    order, corners, flips = (drawn.to(images.device) for drawn in (order, corners, flips))
    for start in range(0, n - size + 1, size):
        now = slice(start, start + size)
        chosen = order[now]
        yield normalized(_cropped(images, chosen, corners[:, now], flips[now])), labels[chosen]


def normalized(images: Tensor) -> Tensor:
    """From bytes, shape (n, h, w, 3), to floats, shape (n, 3, h, w), with the channels last."""
    mean, deviation = (torch.tensor(x, device=images.device) for x in (MEAN, DEVIATION))
    return ((images / 255 - mean) / deviation).permute(0, 3, 1, 2)


def _cropped(images: Tensor, chosen: Tensor, corners: Tensor, flips: Tensor) -> Tensor:
    pixels = torch.arange(SIDE, device=images.device)
    rows, columns = corners[:, :, None] + pixels
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    return images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
