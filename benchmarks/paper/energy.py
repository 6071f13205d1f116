"""How much of its gradient GC takes from each layer of the study's networks, before training."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import optax

import gcx.diagnostics
import gcx.optax
from benchmarks.paper.markdown import table
from benchmarks.paper.network import Network, Weights
from benchmarks.paper.tasks import ALL, BATCH
from benchmarks.paper.training import EVERY_WEIGHT
from gcx.diagnostics import EnergyReport

__all__ = ["energy_removed", "energy_table"]

SEED = 0
BATCHES = 10
NORMS = ("batch norm", "group norm", "no norm")


@cache
def energy_removed(network: Network) -> EnergyReport:
    """Measure the gradients of the first batches, all at the initial weights."""
    weights, statistics = network.start(SEED)
    images, (batches, labels) = ALL.train().x, ALL.draw(SEED)

    @jax.jit
    @jax.grad
    def gradients(weights: Weights, x: Any, y: Any) -> Any:
        logits, _ = network(weights, statistics, x, training=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    grads = [gradients(weights, images[batch], labels[batch]) for batch in batches[:BATCHES]]
    plan = gcx.optax.plan(weights, EVERY_WEIGHT)
    return gcx.diagnostics.energy_removed(grads, layouts=plan)


def energy_table() -> Iterator[str]:
    """Give the lines of a table in Markdown: a row a layer, a column a norm."""
    yield (
        "Share of the gradient's energy that GC removes, by `gcx.diagnostics`, at the initial "
        f"weights of seed {SEED}, over {BATCHES} batches of {BATCH} images. By chance: what is to "
        "be expected of a gradient without a common direction."
    )
    yield ""
    reports = [energy_removed(Network(norm)) for norm in NORMS]
    rows = [
        [
            name.removesuffix("/kernel"),
            f"{share.by_chance:.1%}",
            *[f"{report.shares[name].removed:.0%}" for report in reports],
        ]
        for name, share in reports[0].shares.items()
    ]
    yield from table(["layer", "by chance", *NORMS], rows)
