"""Outcomes that are made up: an effect of known size, and no training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from benchmarks.paper.cells import Cell, Outcome

SEEDS = 10
STEPS = 100

TABLE_1 = [
    Cell("digits, 20 a class", "batch norm", "SGDM", 0.1, decay)
    for decay in (0.0, 1e-4, 2e-4, 5e-4, 1e-3)
]
TABLE_2 = [
    Cell("digits, 20 a class", "batch norm", optimizer, rate, 5e-4)
    for optimizer, rates in {"SGDM": (0.05, 0.1, 0.2), "Adam": (0.0005, 0.001, 0.0015)}.items()
    for rate in rates
]


def arms(cell: Cell, effects: Mapping[str, float], seeds: int = SEEDS) -> list[Outcome]:
    """The arm without, and others that are better by an effect, with some noise of 0.2 points."""
    rng = np.random.default_rng(seeds)
    final = rng.normal(90, 2, seeds)
    loss = np.exp(-np.arange(STEPS) / 30 + rng.normal(0, 0.1, (seeds, STEPS)))
    base = Outcome(
        cell=cell,
        arm="without",
        seeds=tuple(range(seeds)),
        accuracy=np.stack([final - 20, final - 5, final], axis=1),
        loss=loss,
        checkpoints=np.array([STEPS // 4, STEPS // 2, STEPS]),
    )
    others = []
    for arm, effect in effects.items():
        noise = rng.normal(0, 0.2, (seeds, 1))
        others.append(replace(base, arm=arm, accuracy=base.accuracy + effect + noise))
    return [base, *others]
