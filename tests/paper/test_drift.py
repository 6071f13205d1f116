"""Means of the weights and inactive units, along runs of a few steps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from benchmarks.paper import drift
from benchmarks.paper.network import Network
from benchmarks.paper.other_grids import MNIST_TASKS
from benchmarks.paper.training import Grid

NETWORK = Network("group norm", width=4, stem_stride=4)
look = jax.jit(partial(NETWORK.look, training=False))
TASK = replace(MNIST_TASKS[0], steps=6, checkpoints=2)


@pytest.fixture(scope="module")
def watched() -> dict[str, drift.Watched]:
    return drift.watch(NETWORK, Grid(TASK, NETWORK, "SGDM", ((0.1, 5e-4),), drift.ARMS), (0, 1))


def test_with_gc_the_mean_stays(watched):
    with_gc, without = watched["gradient"].mean, watched["without"].mean
    assert with_gc.shape == (2, 1 + TASK.checkpoints)
    np.testing.assert_allclose(with_gc, with_gc[:, :1].repeat(3, axis=1), atol=1e-4)
    np.testing.assert_array_equal(without[:, 0], with_gc[:, 0])
    assert np.abs(without[:, -1] - without[:, 0]).min() > 1e-2


def test_shares_are_those_of_the_start(watched):
    weights, statistics = NETWORK.start(1)
    images = TASK.test().x[: drift.IMAGES]
    _, _, shares = look(weights, statistics, images)
    share = np.concatenate(shares)
    found = watched["without"]
    assert found.dead[1, 0] == pytest.approx(100 * (share == 0).mean())
    assert found.zeros[1, 0] == pytest.approx(100 * (1 - share.mean()), rel=1e-5)


def test_a_unit_that_is_never_active():
    weights, statistics = NETWORK.start(0)
    weights["stem"]["bias"] -= np.array([1e6, 0, 0, 0], np.float32)
    images = TASK.test().x[: drift.IMAGES]
    _, _, (stem, *others) = look(weights, statistics, images)
    assert [*(np.asarray(stem) == 0)] == [True, False, False, False]
    assert len(others) == 4


def test_the_picture_and_the_table_compare_both_runs(watched, tmp_path):
    found = {"MNIST, all images, group norm, learning rate 0.1": watched}
    lines = [*drift._lines(found)]
    assert sum(line.startswith("| MNIST") for line in lines) == 3
    drift._draw(found, TASK.steps, tmp_path / "drift.svg")
    text = (tmp_path / "drift.svg").read_text(encoding="utf-8")
    assert all(f">{words}<" in text for words in ("without GC", "with GC on the gradient"))
    assert len(text) < 60_000
