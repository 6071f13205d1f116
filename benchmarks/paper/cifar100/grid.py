"""The runs of both tables, and the outcomes of those that are finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal

import numpy as np

from benchmarks.paper.cells import BASE, Cell, Outcome
from benchmarks.paper.cifar100.log import Epoch
from benchmarks.paper.cifar100.settings import ARMS, Scale, Setting

__all__ = ["CELLS", "TABLE_1", "TABLE_2", "outcomes", "settings"]


def _cell(optimizer: str, learning_rate: float, weight_decay: float) -> Cell:
    return Cell("CIFAR-100", "ResNet-50", optimizer, learning_rate, weight_decay)


TABLE_1 = tuple(_cell("SGDM", 0.1, decay) for decay in (0.0, 1e-4, 2e-4, 5e-4, 1e-3))
TABLE_2 = (
    *(_cell("SGDM", rate, 5e-4) for rate in (0.05, 0.1, 0.2)),
    *(_cell("Adam", rate, 5e-4) for rate in (0.0005, 0.001, 0.0015)),
)
CELLS = tuple(dict.fromkeys((*TABLE_1, *TABLE_2)))  # they share one


def settings(
    *,
    seeds: int,
    epochs: int,
    layers: str,
    scale: Scale,
    precision: Literal["bfloat16", "float32"],
    data: str,
) -> list[Setting]:
    """List all runs, seed by seed: a study that is stopped has both arms of most cells."""
    arms = [arm for arm, centralized in ARMS.items() if centralized in {None, layers}]
    return [
        Setting(cell, arm, seed, epochs, scale, precision, data)
        for seed, cell, arm in product(range(seeds), CELLS, arms)
    ]


def outcomes(logs: Mapping[Setting, Sequence[Epoch]]) -> list[Outcome]:
    """Gather the runs that are finished in both arms, cell by cell."""
    finished = {setting for setting, log in logs.items() if len(log) == setting.epochs}
    arms = tuple(dict.fromkeys(setting.arm for setting in logs))
    pairs: dict[Cell, list[Setting]] = {}
    for setting in logs:
        if setting.arm == BASE and all(replace(setting, arm=arm) in finished for arm in arms):
            pairs.setdefault(setting.cell, []).append(setting)
    return [
        _outcome({s.seed: logs[replace(s, arm=arm)] for s in pairs[cell]}, cell, arm)
        for cell, arm in product(pairs, arms)
    ]


def _outcome(logs: Mapping[int, Sequence[Epoch]], cell: Cell, arm: str) -> Outcome:
    rows = list(logs.values())
    return Outcome(
        cell=cell,
        arm=arm,
        seeds=tuple(logs),
        accuracy=np.array([[epoch.test_accuracy for epoch in log] for log in rows]),
        loss=np.array([[epoch.training_loss for epoch in log] for log in rows]),
        checkpoints=np.array([epoch.epoch for epoch in rows[0]]),
    )
