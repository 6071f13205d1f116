"""The same call on the same numbers gives the same result in every library, compared in pairs."""

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
# different orders. A dtype narrower than 32 bits is rounded once, from results that agree.
WIDE = {"float32": 4 * 2**-23, "float64": 4 * 2**-52, "complex64": 4 * 2**-23}
NARROW = {"float16": 2**-10, "bfloat16": 2**-7}

GRADS = [
    ("o...", (5, 7)),
    ("o...", (8, 3, 5, 5)),
    ("o...", (3, 5000)),
    ("...o", (7, 5)),
    ("...o", (3, 3, 4, 6)),
    ("io...", (4, 5, 3, 3)),
    ("ioo", (6, 2, 3)),
    ("iio", (2, 3, 6)),
    ("oio", (3, 4, 5)),
    ("...", (9,)),
]
OPTIMIZERS = {
    "sgd": SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": Adam(0.01, where="update"),
    "adamw": AdamW(0.01),
}
STEPS = 10


@pytest.mark.parametrize(
    ("layout", "shape"), GRADS, ids=[f"{layout} {shape}" for layout, shape in GRADS]
)
def test_centralize_agrees(
    pair: tuple[libraries.ArrayLibrary, libraries.ArrayLibrary], layout: str, shape: Any
) -> None:
    narrow = set.intersection(*[set(xp.narrow_dtypes) for xp in pair]) & set(NARROW)
    for dtype, tolerance in [*WIDE.items(), *[(dtype, NARROW[dtype]) for dtype in narrow]]:
        one, other = [centralized(xp, layout, shape, dtype) for xp in pair]
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
def centralized(xp: libraries.ArrayLibrary, layout: str, shape: Any, dtype: str) -> Any:
    grad = np.random.default_rng(0).normal(0.5, 1.0, shape)
    return xp.numpy(gcx.centralize(xp.asarray(grad, dtype), layout=layout))


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
