"""What the paper proves of Gradient Centralization, on every library.

Corollary 4.1: the fan-in means of the weights stay what they were, which fixes the answer of a unit
to a shift of its input. Proposition 4.2: the norms of the gradient and of the Hessian do not grow.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gcx

import reference
from test_optim import FAN_INS, LAYOUTS, OPTIMIZERS, leaves, problem, trained

GAMMA = 0.7


@pytest.mark.parametrize("place", [None, "gradient", "update"])
@pytest.mark.parametrize("name", ["momentum-decay", "adam-decay", "adamw-decay"])
def test_training_keeps_the_fan_in_means(xp: Any, name: str, place: Any) -> None:
    """The supplement subtracts the answers the other way round, and forgets the sign."""
    optimizer = replace(OPTIMIZERS[name], where=place, layouts=LAYOUTS if place else "o...")
    params, _ = trained(xp, optimizer, 3 if xp.name == "dask" else 20)
    start, end = leaves(problem(0)[0]), {key: xp.numpy(w) for key, w in leaves(params).items()}
    keeps = place == "update" or (place == "gradient" and name == "momentum-decay")
    for key, axes in FAN_INS.items():
        drift = np.abs(reference.fan_in_means(end[key] - start[key], axes)).max()
        assert drift < 1e-14 if keeps else drift > 1e-3
    x, w = np.random.default_rng(2).uniform(size=(64, 5)), end["dense/kernel"]
    answer = (x + GAMMA) @ w - x @ w
    assert np.allclose(answer, GAMMA * start["dense/kernel"].sum(0), rtol=0, atol=1e-13) is keeps


def test_the_norm_of_the_hessian_falls(xp: Any) -> None:
    hessian = hessian_by_complex_step()
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


def hessian_by_complex_step() -> Any:
    """Hessian of a loss in the weight of 5 units: (out, in, one column for each element).

    A gradient at ``w + i h v`` has the imaginary part ``h H v``, exact to rounding for small h.
    """
    rng, h = np.random.default_rng(1), 1e-30
    x, target = rng.uniform(0.0, 1.0, (64, 6)), rng.normal(size=64)
    first, second = rng.normal(0.1, 0.4, (5, 6)), rng.normal(size=5)

    def gradient(w: Any) -> Any:
        """Differentiate half the mean square of the errors, without a conjugate or a modulus."""
        hidden = np.tanh(x @ w.T)
        error = (hidden @ second - target) / len(x)
        return (error[:, None] * second * (1 - hidden**2)).T @ x

    directions = np.eye(first.size).reshape(-1, *first.shape)
    return np.stack([gradient(first + 1j * h * v).imag / h for v in directions], axis=-1)
