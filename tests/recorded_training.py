"""Gradients of a small network on scanned digits, recorded once, and SGD on them in plain NumPy.

Whoever steps through the same gradients in the same arithmetic ends in the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

import canonical_order

STEPS, BATCH = 200, 32

Arrays = dict[str, Any]

# Layout and fan-in axes of each weight: one as in torch, one as in JAX, and what is left alone.
LAYOUTS = {"hidden": "o...", "hidden_bias": None, "output": "...o", "output_bias": None}
AXES = {"hidden": (1,), "output": (0,)}


@cache
def start() -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "hidden": 0.1 * rng.normal(size=(32, 64)),
        "hidden_bias": np.zeros(32),
        "output": 0.1 * rng.normal(size=(32, 10)),
        "output_bias": np.zeros(10),
    }


@cache
def gradients() -> list[Arrays]:
    """What plain SGD sees, batch by batch."""
    images, labels = load_digits(return_X_y=True)
    targets = np.eye(10)[labels]
    rng = np.random.default_rng(1)
    weights, recorded = start(), []
    for _ in range(STEPS):
        batch = rng.integers(0, len(images), BATCH)
        grads = _gradients(weights, images[batch] / 16, targets[batch])
        weights = {name: weight - 0.5 * grads[name] for name, weight in weights.items()}
        recorded.append(grads)
    return recorded


def _gradients(weights: Arrays, x: Any, targets: Any) -> Arrays:
    """Of the mean cross-entropy, through one hidden layer of tanh."""
    hidden = np.tanh(x @ weights["hidden"].T + weights["hidden_bias"])
    scores = np.exp(hidden @ weights["output"] + weights["output_bias"])
    error = (scores / scores.sum(axis=1, keepdims=True) - targets) / len(x)
    back = error @ weights["output"].T * (1 - hidden**2)
    return {
        "hidden": back.T @ x,
        "hidden_bias": back.sum(axis=0),
        "output": hidden.T @ error,
        "output_bias": error.sum(axis=0),
    }


def trained(dtype: str, lr: float, *, momentum: float) -> Arrays:
    """Weights after SGD with GC in the canonical order, each operation rounded by itself."""
    number = np.dtype(dtype).type
    weights = {name: weight.astype(dtype) for name, weight in start().items()}
    buffers = {name: np.zeros_like(weight) for name, weight in weights.items()}
    for grads in gradients():
        for name, weight in weights.items():
            grad = grads[name].astype(dtype)
            if name in AXES:
                grad = canonical_order.centralized(grad, AXES[name], dtype)
            buffers[name] = number(momentum) * buffers[name] + grad
            weights[name] = weight - number(lr) * buffers[name]
    return weights
