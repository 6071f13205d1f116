"""What GC removes from the study's networks, against a sum in float64."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from benchmarks.paper import energy
from benchmarks.paper.network import Network
from benchmarks.paper.tasks import ALL

import reference

HEADER = "| layer | by chance | batch norm | group norm | no norm |"


def test_the_share_of_the_head() -> None:
    network = Network("group norm")
    weights, statistics = network.start(energy.SEED)
    images, (batches, labels) = ALL.train().x, ALL.draw(energy.SEED)

    @jax.jit
    @jax.grad
    def gradient(kernel, x, y):
        head = {**weights["head"], "kernel": kernel}
        logits, _ = network({**weights, "head": head}, statistics, x, training=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    removed = total = 0.0
    for batch in batches[: energy.BATCHES]:
        grad = np.asarray(gradient(weights["head"]["kernel"], images[batch], labels[batch]), float)
        removed += len(grad) * np.sum(reference.fan_in_means(grad, (0,)) ** 2)
        total += np.sum(grad**2)
    shares = energy.energy_removed(network).shares
    assert shares["head/kernel"].removed == pytest.approx(removed / total, rel=1e-4)
    assert 0.1 < removed / total < 1


def test_a_row_for_each_layer() -> None:
    lines = list(energy.energy_table())
    rows = [line.strip("| ").split(" | ") for line in lines[lines.index(HEADER) + 2 :]]
    assert [row[0] for row in rows] == sorted(
        ["head", "stem", "stage0_block0/first", "stage0_block0/second"]
        + [f"stage1_block0/{name}" for name in ("first", "second", "shortcut")]
    )
    for _, *shares in rows:
        assert len(shares) == 4
        assert all(0 <= float(share.rstrip("%")) <= 100 for share in shares)
