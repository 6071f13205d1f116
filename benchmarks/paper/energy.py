"""How much of its gradient GC takes from each layer of the study's networks, before training."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import optax

import gcx.diagnostics.jax
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

    def loss(weights: Weights, batch: Any) -> Any:
        x, y = batch
        logits, _ = network(weights, statistics, x, training=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    drawn = [(images[batch], labels[batch]) for batch in batches[:BATCHES]]
    return gcx.diagnostics.jax.energy_removed(weights, drawn, loss, layouts=EVERY_WEIGHT)


def energy_table() -> Iterator[str]:
    """Give the lines of a table in Markdown: a row a layer, a column a norm."""
    yield (
        "Share of the gradient's energy that GC removes, by `gcx.diagnostics.jax`, at the initial "
        f"weights of seed {SEED}, over {BATCHES} batches of {BATCH} images. By chance: what is to "
        "be expected of a gradient without a common direction."
    )
    yield ""
    reports = [energy_removed(Network(norm)) for norm in NORMS]
    rows = [
        [
            row.name.removesuffix("/kernel"),
            f"{row.share.by_chance:.1%}",
            *_shares(reports, row.name),
        ]
        for row in reports[0].rows
        if row.share is not None
    ]
    yield from table(["layer", "by chance", *NORMS], rows)


def _shares(reports: list[EnergyReport], name: str) -> list[str]:
    """Write the share of a layer in each report."""
    found = [row.share for report in reports for row in report.rows if row.name == name]
    return [f"{share.removed:.0%}" for share in found if share is not None]
