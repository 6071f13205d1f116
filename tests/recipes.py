"""Adaptive gradient clipping as docs/plans_for_others.md has it, and written out unit by unit."""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE = Path(__file__).parents[1] / "docs" / "plans_for_others.md"

Float64 = NDArray[np.float64]

CLIPPING, EPS = 0.2, 1e-3


def recipe(function: str) -> Any:
    """Run the block of the page that defines a function, and return the function."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if f"def {function}(" in block]
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102 - the page is ours
    return names[function]


def gradient_and_weight(*shape: int) -> tuple[Float64, Float64]:
    """Draw both, of many magnitudes along each axis."""
    rng = np.random.default_rng(16)
    scales = (reduce(np.multiply.outer, [10 ** rng.uniform(-1, 1, n) for n in shape]) for _ in "gw")
    grad, weight = (scale * rng.standard_normal(shape) for scale in scales)
    return grad, weight


def clip_by_hand(grad: Float64, weight: Float64, letters: str) -> Float64:
    """Clip the gradient of each output unit; `letters` has an i for each axis of the fan-in."""
    grad, clipped = grad.copy(), []
    kept = [size if letter != "i" else 1 for letter, size in zip(letters, grad.shape, strict=True)]
    for index in np.ndindex(*kept):
        unit = tuple(
            slice(None) if letter == "i" else k for letter, k in zip(letters, index, strict=True)
        )
        norm = np.sqrt(np.sum(grad[unit] ** 2))
        limit = CLIPPING * max(np.sqrt(np.sum(weight[unit] ** 2)), EPS)
        clipped.append(norm > limit)
        if norm > limit:
            grad[unit] *= limit / norm
    assert set(clipped) == {True, False}
    return grad
