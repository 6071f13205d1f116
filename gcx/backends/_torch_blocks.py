"""Blocks of tensors in a dtype narrower than 32 bits, whose copies in float32 stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements of a block: half a MiB of float32.
_BLOCK = 1 << 17

# Neighbours in memory that stay together.
_RUN = 1 << 9


def is_large(x: Tensor, axes: tuple[int, ...]) -> bool:
    """Return True for a tensor on a CPU that is worth cutting between its output units."""
    return x.numel() > 2 * _BLOCK and x.device.type == "cpu" and len(axes) < x.ndim


def split(tensors: Sequence[Tensor], axes: tuple[int, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape into blocks of whole output units, by the strides of the first."""
    shape, steps = tensors[0].shape, tensors[0].stride()
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    cut = max(kept, key=lambda axis: steps[axis] if shape[axis] > 1 else 0)
    fitting = _BLOCK * shape[cut] // tensors[0].numel()
    size = max(fitting, _RUN // (steps[cut] or 1), 1)
    return zip(*[torch.split(x, size, cut) for x in tensors], strict=True)
