"""Gradient Centralization in plain Python: slow, independent of gcx, right to the last bit."""

from __future__ import annotations

from math import fsum
from typing import Any

import numpy as np


def values(*shape: int, seed: int = 0) -> Any:
    """Draw numbers whose mean is not zero."""
    return np.random.default_rng(seed).normal(loc=3.0, size=shape)


def fan_in_means(x: Any, axes: tuple[int, ...]) -> Any:
    """Exactly rounded float64 (or complex128) means over `axes`, which stay with size 1."""
    wide = _wide(x)
    kept = [a for a in range(wide.ndim) if a not in {k % wide.ndim for k in axes}]
    means = np.zeros([n if a in kept else 1 for a, n in enumerate(wide.shape)], wide.dtype)
    for unit in np.ndindex(*[wide.shape[a] for a in kept]):
        index: list[Any] = [slice(None)] * wide.ndim
        for a, k in zip(kept, unit, strict=True):
            index[a] = k
        values = wide[tuple(index)].ravel()
        mean = fsum(values.real) / values.size
        if np.iscomplexobj(values):
            mean = complex(mean, fsum(values.imag) / values.size)
        means[tuple(k if isinstance(k, int) else 0 for k in index)] = mean
    return means


def centralized(x: Any, axes: tuple[int, ...]) -> Any:
    """``x - mean(x, axes)`` in float64."""
    return _wide(x) - fan_in_means(x, axes)


def _wide(x: Any) -> Any:
    x = np.asarray(x)
    return x.astype(np.result_type(x, np.float64))
