"""Training in JAX: schedule, arms that are equal, and all runs of a grid in one program."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from benchmarks.paper.cells import BASE
from benchmarks.paper.training import optimizer

from reference import fan_in_means
from short_runs import NORMS, SEED, grid, in_jax


@pytest.mark.parametrize("steps", [180, 24, 12])
def test_the_learning_rate_falls_after_30_60_and_90_percent_of_the_steps(steps):
    rule = optimizer("SGDM", BASE, 2.0, 0.0, steps)
    state, updates = rule.init(np.zeros(2)), []
    for _ in range(steps):
        update, state = rule.update(np.ones(2), state, np.zeros(2))
        updates.append(update[0])
    momentum = (1 - 0.9 ** np.arange(1, steps + 1)) / (1 - 0.9)
    rates = -np.array(updates) / momentum
    done = np.arange(steps) / steps
    falls = sum(np.round(done, 9) >= part for part in (0.3, 0.6, 0.9))
    np.testing.assert_allclose(rates, 2.0 * 0.1**falls, rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_sgdm_moves_alike_with_gradient_and_update_centralized(norm):
    runs = in_jax(grid(norm, "SGDM"))
    gradient, update = runs["gradient"], runs["update"]
    np.testing.assert_allclose(gradient.loss, update.loss, rtol=2e-5)
    for one, other in zip(*map(jax.tree.leaves, (gradient.weights, update.weights)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(gradient.loss / runs[BASE].loss - 1).max() > 1e-3


def test_adam_does_not():
    runs = in_jax(grid("batch norm", "Adam"))
    assert np.abs(runs["gradient"].loss / runs["update"].loss - 1).max() > 1e-3


@pytest.mark.parametrize(
    ("optimizer", "arm", "where"),
    [
        ("SGDM", BASE, []),
        ("SGDM", "gradient", ["stem", "block", "head"]),
        ("SGDM", "conv only", ["stem", "block"]),
        ("Adam", "gradient", []),
        ("Adam", "update", ["stem", "block", "head"]),
    ],
)
def test_where_the_fan_in_means_stay(optimizer, arm, where):
    of = grid("batch norm", optimizer)
    before, after = of.network.start(SEED)[0], in_jax(of)[arm].weights
    kernels = {
        "stem": lambda weights: weights["stem"]["kernel"],
        "block": lambda weights: weights["stage1_block0"]["first"]["kernel"],
        "head": lambda weights: weights["head"]["kernel"],
    }
    moved = {
        name: np.abs(_means(kernel(after)) - _means(kernel(before))).max()
        for name, kernel in kernels.items()
    }
    assert [name for name, distance in moved.items() if distance < 2e-7] == where
    assert all(moved[name] > 1e-5 for name in set(moved) - set(where))


def _means(kernel):
    return fan_in_means(kernel, tuple(range(kernel.ndim - 1)))
