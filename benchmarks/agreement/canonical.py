"""The canonical order of summation in plain NumPy, written from its definition alone.

The definition is in ``docs/reproducible.md``. Nothing here comes from the backends, which `check
--bits` compares with it.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import numpy as np

from benchmarks.agreement.formats import Format
from benchmarks.agreement.gradients import keepdims, unit_rows

__all__ = ["DTYPES", "centralized"]

DTYPES = ("float64", "float32", "float16", "bfloat16")

_SEGMENT = 16384


def centralized(values: Any, fan_in: tuple[int, ...], kind: Format) -> Any:
    """``values - mean(values)`` to the last bit, of numbers that the format holds.

    In float64 for float64, else in float32, which holds the numbers of the narrower formats.
    """
    x = values.astype(np.float64 if kind.name == "float64" else np.float32)
    rows = unit_rows(x, fan_in)
    means = _sums(rows) / x.dtype.type(rows.shape[1])
    difference = x - means.reshape(keepdims(x.shape, fan_in))
    return kind.round(difference.astype(np.float64)).astype(x.dtype)


def _sums(rows: Any) -> Any:
    starts = range(0, rows.shape[1], _SEGMENT)
    return reduce(add, [_halved(rows[:, start : start + _SEGMENT]) for start in starts])


def _halved(rows: Any) -> Any:
    """Add the second half of rows to the first, until one element is left."""
    units, size = rows.shape
    width = 1 << (size - 1).bit_length()
    padded = np.full((units, width), -0.0, rows.dtype)
    padded[:, :size] = rows
    while width > 1:
        width //= 2
        padded = padded[:, :width] + padded[:, width:]
    return padded[:, 0]
