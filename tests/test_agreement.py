"""The same training on the same numbers ends alike in every library, compared in pairs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

import gcx
from gcx._names import flatten
from gcx.optim import SGD, Adam, AdamW

import libraries

# Rounding errors allowed between two libraries, in units of the largest element: they sum in
# different orders.
WIDE = {"float32": 4 * 2**-23, "float64": 4 * 2**-52}

OPTIMIZERS = {
    "sgd": SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": Adam(0.01, where="update"),
    "adamw": AdamW(0.01),
}
STEPS = 10


def test_long_sums_agree(pair: tuple[libraries.ArrayLibrary, libraries.ArrayLibrary]) -> None:
    numbers = np.random.default_rng(0).normal(0.5, 1.0, (3, 5000))
    for dtype, tolerance in {**WIDE, "complex64": WIDE["float32"]}.items():
        one, other = (xp.numpy(gcx.centralize(xp.asarray(numbers, dtype))) for xp in pair)
        assert_close(one, other, tolerance, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_agrees(
    pair: tuple[libraries.ArrayLibrary, libraries.ArrayLibrary], name: str, dtype: str
) -> None:
    one, other = [trajectory(xp, name, dtype) for xp in pair]
    assert one.keys() == other.keys()
    for key, leaf in one.items():
        assert_close(leaf, other[key], STEPS * WIDE[dtype], key)


@cache
def trajectory(xp: libraries.ArrayLibrary, name: str, dtype: str) -> dict[str, Any]:
    """Weights and state at the end of some steps, by name."""
    rng = np.random.default_rng(0)
    layouts = {"conv": "o...", "kernel": "...o"}
    optimizer = replace(OPTIMIZERS[name], layouts=layouts)

    def draw() -> dict[str, Any]:
        shapes = {"conv": (4, 3, 2, 2), "kernel": (5, 3)}
        return {key: xp.asarray(rng.normal(size=shape), dtype) for key, shape in shapes.items()}

    params = draw()
    state = optimizer.init(params)
    for _ in range(STEPS):
        params, state = optimizer.update(params, draw(), state)
    return {
        key: leaf if isinstance(leaf, int) else xp.numpy(leaf)
        for key, leaf in flatten([params, state])
    }


def assert_close(one: Any, other: Any, tolerance: float, what: str) -> None:
    atol = tolerance * np.max(np.abs(one))
    np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=what)
