"""What is learned: scanned digits, the weights to start from, and the order of the batches.

All of it is NumPy and drawn once, so that every framework trains from the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

__all__ = ["BATCH", "DTYPES", "NETWORKS", "STEPS_PER_EPOCH", "Problem", "Split", "make"]

# Kernels by layer, output units last: (in, out) and (height, width, in, out). A framework that
# keeps the output units first has to transpose them.
NETWORKS: dict[str, dict[str, tuple[int, ...]]] = {
    "mlp": {"hidden": (64, 32), "output": (32, 10)},
    "cnn": {"first": (3, 3, 1, 16), "second": (3, 3, 16, 32), "output": (32, 10)},
}

# The losses of the small network are compared between frameworks to the last digits.
DTYPES = {"mlp": "float64", "cnn": "float32"}

BATCH = 64
_N_TEST = 360
STEPS_PER_EPOCH = (1797 - _N_TEST) // BATCH


@dataclass(frozen=True)
class Split:
    """Images of 8x8 pixels from 0 to 1, and the digits that they show."""

    images: Any
    labels: Any


@dataclass(frozen=True)
class Problem:
    """A training run but for the framework and the optimizer."""

    network: str
    train: Split
    test: Split
    weights: dict[str, dict[str, Any]]  # {layer: {"kernel": ..., "bias": ...}}
    batches: Any  # one row of indices into `train` for each step


def make(network: str, seed: int, steps: int) -> Problem:
    """Draw weights and batches; which images are for testing is the same for every seed."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[network]
    train, test = (Split(part.images.astype(dtype), part.labels) for part in _digits())
    weights = {
        layer: {"kernel": _kernel(rng, shape).astype(dtype), "bias": np.zeros(shape[-1], dtype)}
        for layer, shape in NETWORKS[network].items()
    }
    return Problem(network, train, test, weights, _batches(rng, len(train.labels), steps))


@cache
def _digits() -> tuple[Split, Split]:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images[order] / 16, digits.target[order]
    return Split(images[_N_TEST:], labels[_N_TEST:]), Split(images[:_N_TEST], labels[:_N_TEST])


def _kernel(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Draw with the variance that keeps that of the activations (He et al., 2015)."""
    fan_in = np.prod(shape[:-1])
    return rng.normal(0, np.sqrt(2 / fan_in), shape)


def _batches(rng: np.random.Generator, n_images: int, steps: int) -> Any:
    in_epoch = STEPS_PER_EPOCH * BATCH
    epochs = -(-steps // STEPS_PER_EPOCH)
    orders = [rng.permutation(n_images)[:in_epoch] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, BATCH)[:steps]
