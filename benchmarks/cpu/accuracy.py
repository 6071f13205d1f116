"""Largest error against float64, in ulp of the largest magnitude of the output unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np

import gcx
from gcx import backends

__all__ = ["Accuracy", "accuracies"]

FAN_INS = (27, 576, 4608, 150_528, 1_000_000)
UNITS = 8
ROWS = {"mean 0, spread 1": 0.0, "mean 1e4, spread 1": 1e4}


class Accuracy(NamedTuple):
    """The error at one fan-in."""

    library: str
    fan_in: int
    axis: str
    rows: str
    gcx: float
    expression: float


def accuracies(library: str) -> Iterator[Accuracy]:
    """Errors of gcx and of ``g - g.mean(axis, keepdims=True)`` in float32 on the CPU."""
    for fan_in, (rows, offset), axis in product(FAN_INS, ROWS.items(), ("trailing", "leading")):
        k = 1 if axis == "trailing" else 0
        shape = (UNITS, fan_in) if k else (fan_in, UNITS)
        values = np.random.default_rng(fan_in).standard_normal(shape) + offset
        values = values.astype(np.float32)
        yield Accuracy(
            library,
            fan_in,
            axis,
            rows,
            _error(library, values, k, lambda g, k: gcx.centralize(g, axis=k)),
            _error(library, values, k, lambda g, k: g - _mean(g, k)),
        )


def _error(library: str, values: Any, axis: int, operator: Callable[[Any, int], Any]) -> float:
    backend = backends.load(library)
    device = next(d for d in backend.devices() if "cpu" in d.lower())
    result = backend.to_numpy(operator(backend.asarray(values, "float32", device), axis))
    exact = values.astype(np.float64)
    exact -= exact.mean(axis, keepdims=True)
    ulp = np.spacing(np.abs(values).max(axis, keepdims=True))
    return float((np.abs(result - exact) / ulp).max())


def _mean(g: Any, axis: int) -> Any:
    # NumPy and JAX say keepdims, torch keepdim.
    return g.mean(axis, True) if hasattr(g, "is_floating_point") else g.mean(axis, keepdims=True)
