"""What the paper proves of Gradient Centralization, after real training, on every library.

Corollary 4.1: the fan-in means of the weights stay what they were, which fixes the answer of a unit
to a shift of its input. Proposition 4.2: the norms of the gradient and of the Hessian do not grow.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gcx
from gcx.optim import SGD, Adam

import libraries
import reference

GAMMA = 0.7

KEEP_THE_MEANS = {
    "sgd": SGD(0.5),
    "momentum-decay": SGD(0.1, momentum=0.9, weight_decay=1e-3),
    "adam-update": Adam(0.05, where="update"),
}
DO_NOT = {
    "sgd-plain": SGD(0.5, where=None),
    "momentum-plain": SGD(0.1, momentum=0.9, where=None),
    "adam-gradient": Adam(0.05, where="gradient"),
}

Weights = dict[str, Any]
Data = tuple[Any, Any]


# A network of one hidden layer in NumPy, its weights (out, in). Nothing in it conjugates or takes a
# modulus, so complex weights differentiate it once more.


def start_weights(fan_in: int, hidden: int, out: int) -> Weights:
    rng = np.random.default_rng(1)
    return {
        "first": rng.normal(0.5 / fan_in, 1 / math.sqrt(fan_in), (hidden, fan_in)),
        "bias": np.zeros(hidden),
        "second": rng.normal(0.5 / hidden, 1 / math.sqrt(hidden), (out, hidden)),
    }


def outputs(weights: Weights, x: Any) -> tuple[Any, Any]:
    """Of the hidden units, and of the network."""
    hidden = np.tanh(x @ weights["first"].T + weights["bias"])
    return hidden, hidden @ weights["second"].T


def loss(weights: Weights, data: Data) -> float:
    x, target = data
    return float(np.sum((outputs(weights, x)[1] - target) ** 2) / (2 * len(x)))


def gradients(weights: Weights, data: Data) -> Weights:
    """Of `loss`, by back-propagation."""
    x, target = data
    hidden, output = outputs(weights, x)
    error = (output - target) / len(x)
    to_hidden = error @ weights["second"] * (1 - hidden**2)
    return {"first": to_hidden.T @ x, "bias": to_hidden.sum(axis=0), "second": error.T @ hidden}


def regression() -> Data:
    """Inputs that are not negative, as after a ReLU, and nonlinear functions of them."""
    x = np.random.default_rng(2).uniform(0.0, 1.0, (64, 6))
    return x, np.stack([np.sin(3 * x[:, 0]) + x[:, 1], x[:, 2] * x[:, 3]], axis=1)


def trained(
    xp: libraries.ArrayLibrary, optimizer: Any, start: Weights, data: Data, *, steps: int = 20
) -> Weights:
    """Weights after training on the library, which stores them as the layout says."""

    def stored(weights: Weights) -> Weights:
        return {name: w if optimizer.layouts == "o..." else w.T for name, w in weights.items()}

    params = {name: xp.asarray(w) for name, w in stored(start).items()}
    state = optimizer.init(params)
    weights = start
    for _ in range(steps):
        grads = stored(gradients(weights, data))
        params, state = optimizer.update(
            params, {name: xp.asarray(grad) for name, grad in grads.items()}, state
        )
        if xp.name == "dask":  # lazy: each step would compute all those before it once more
            import dask

            params, state = dask.persist(params, state)
        weights = stored({name: xp.numpy(w) for name, w in params.items()})
    return weights


def drift(start: Weights, end: Weights) -> float:
    """Largest change of a fan-in mean."""
    means = [reference.fan_in_means(end[name] - start[name], (1,)) for name in ("first", "second")]
    return max(float(np.max(np.abs(mean))) for mean in means)


def shift_error(start: Weights, end: Weights, x: Any) -> float:
    """How far ``w^T (x + gamma 1) - w^T x`` is from ``gamma 1^T w_start``, at most.

    The supplement of the paper subtracts the other way round and forgets the sign.
    """
    answer = (x + GAMMA) @ end["first"].T - x @ end["first"].T
    return float(np.max(np.abs(answer - GAMMA * start["first"].sum(axis=1))))


# Corollary 4.1


@pytest.mark.parametrize("layout", ["o...", "...o"])
@pytest.mark.parametrize("name", KEEP_THE_MEANS)
def test_training_keeps_the_fan_in_means(xp: Any, name: str, layout: str) -> None:
    start, data = start_weights(6, 5, 2), regression()
    end = trained(xp, replace(KEEP_THE_MEANS[name], layouts=layout), start, data)
    assert loss(end, data) < 0.4 * loss(start, data)
    assert drift(start, end) < 1e-14
    assert shift_error(start, end, data[0]) < 1e-13


@pytest.mark.parametrize("name", DO_NOT)
def test_without_centralization_of_the_step_the_means_drift(name: str) -> None:
    start, data = start_weights(6, 5, 2), regression()
    end = trained(libraries.MAKERS["numpy"]()[0], DO_NOT[name], start, data)
    assert loss(end, data) < 0.4 * loss(start, data)
    assert drift(start, end) > 0.05
    assert shift_error(start, end, data[0]) > 0.05


# Proposition 4.2


def test_the_norm_of_the_hessian_falls(xp: Any) -> None:
    hessian = hessian_by_complex_step(start_weights(6, 5, 2), regression())
    _, fan_in, columns = hessian.shape
    np.testing.assert_allclose(hessian.reshape(columns, -1), hessian.reshape(columns, -1).T)
    projected = xp.numpy(gcx.centralize(xp.asarray(hessian), layout="oio"))

    def largest_singular_value(matrix: Any) -> Any:
        return np.linalg.norm(matrix.reshape(columns, columns), 2)

    assert largest_singular_value(projected) < largest_singular_value(hessian)
    norms, before = [np.sum(matrix**2, axis=(0, 1)) for matrix in (projected, hessian)]
    means = np.sum(reference.fan_in_means(hessian, (1,)) ** 2, axis=(0, 1))
    np.testing.assert_allclose(norms, before - fan_in * means, rtol=0, atol=1e-14 * before.max())
    assert (norms < before).all()


def hessian_by_complex_step(weights: Weights, data: Data) -> Any:
    """Hessian of the loss in the first weight: (out, in, one column for each element).

    A gradient at ``w + i h v`` has the imaginary part ``h H v``, exact to rounding for small h.
    """
    h, first = 1e-30, weights["first"]
    directions = np.eye(first.size).reshape(-1, *first.shape)
    products = [
        gradients({**weights, "first": first + 1j * h * v}, data)["first"].imag / h
        for v in directions
    ]
    return np.stack(products, axis=-1)
