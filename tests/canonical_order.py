"""The canonical order of summation in plain NumPy: slow, independent of gcx, unit by unit.

The definition is that of docs/reproducible.md. Numbers come and go in the precision that sums have
(float64 for float64, else float32), which holds every number of a narrower dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import numpy as np

DTYPES = ("float16", "bfloat16", "float32", "float64")

SEGMENT = 16384


def centralized(x: Any, axes: tuple[int, ...], dtype: str, strength: float = 1.0) -> Any:
    """``x - strength * mean(x, axes)`` of numbers that `dtype` holds, rounded as it rounds."""
    x = np.asarray(x, working_dtype(dtype))
    result = np.empty_like(x)
    for unit in output_units(x.shape, axes):
        result[unit] = rounded(x[unit] - scaled_mean(x[unit], strength), dtype)
    return result


def sgd(
    weight: Any,
    grads: Sequence[Any],
    axes: tuple[int, ...] | None,
    lr: float,
    *,
    where: str = "gradient",
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> Any:
    """Train a weight, each operation rounded by itself; without axes, it is not centralized."""
    number, buffer = weight.dtype.type, None

    def project(x: Any, at: str) -> Any:
        return centralized(x, axes, weight.dtype.name) if axes and where == at else x

    for grad in grads:
        d = project(grad + number(weight_decay) * weight, "gradient")
        if momentum:
            buffer = d if buffer is None else number(momentum) * buffer + d
            d = d + number(momentum) * buffer if nesterov else buffer
        weight = weight - number(lr) * project(d, "update")
    return weight


def output_units(shape: tuple[int, ...], axes: tuple[int, ...]) -> list[Any]:
    """An index for each output unit, which leaves its fan-in axes, in their order."""
    sizes = [1 if axis in axes else size for axis, size in enumerate(shape)]
    return [
        tuple(slice(None) if axis in axes else k for axis, k in enumerate(position))
        for position in np.ndindex(*sizes)
    ]


def scaled_mean(unit: Any, strength: float) -> Any:
    number = unit.dtype.type
    return canonical_sum(unit.ravel()) / number(unit.size) * number(strength)


def canonical_sum(values: Any) -> Any:
    """Sum of a fan-in, the first axis: its segments from left to right."""
    return reduce(add, [halved(values[k : k + SEGMENT]) for k in range(0, len(values), SEGMENT)])


def halved(segment: Any) -> Any:
    """Sum of a segment: the second half onto the first, until one number is left."""
    length = 1 << (len(segment) - 1).bit_length()
    padded = np.full((length, *segment.shape[1:]), -0.0, segment.dtype)
    padded[: len(segment)] = segment
    while len(padded) > 1:
        middle = len(padded) // 2
        padded = padded[:middle] + padded[middle:]
    return padded[0]


def rounded(x: Any, dtype: str) -> Any:
    """To the nearest number of `dtype`, ties to even."""
    if dtype != "bfloat16":
        return x.astype(dtype).astype(x.dtype)
    # bfloat16 is the upper half of a float32. Adding just less than half of the last place that is
    # kept, and one more if that place is odd, carries into the upper half where it is to go up.
    bits = np.ascontiguousarray(x).view(np.uint32)
    is_odd = (bits >> 16) & 1
    nearest = ((bits + 0x7FFF + is_odd) & 0xFFFF0000).view(np.float32)
    return np.where(np.isnan(x), x, nearest).reshape(x.shape)


def working_dtype(dtype: str) -> Any:
    return np.float64 if dtype == "float64" else np.float32
