"""Trainings of a few steps in JAX and in PyTorch, from the same start."""

from __future__ import annotations

from functools import cache

import jax
import numpy as np

from benchmarks.paper import on_torch, training
from benchmarks.paper.network import Network
from benchmarks.paper.tasks import Task
from benchmarks.paper.training import Grid, Start

SEED = 0
NORMS = ("batch norm", "group norm", "no norm")
OPTIMIZERS = ("SGDM", "Adam")
ARMS = ("without", "gradient", "update", "conv only")
# Of three classes, so that tests of accuracy are short.
TASK = Task("short", images_a_class=30, classes=(3, 5, 8), steps=12, checkpoints=4)
BEFORE = Task("before", images_a_class=40, classes=(0, 1), steps=12, checkpoints=1)

# The decay is large, so that it shows in a few steps.
RATES = {"SGDM": 0.05, "Adam": 0.001, "AdamW": 0.001}
DECAY = 0.05


def grid(
    norm: str, optimizer: str, arms: tuple[str, ...] = ARMS, pretraining: Task | None = None
) -> Grid:
    network = Network(norm, width=8)
    return Grid(TASK, network, optimizer, ((RATES[optimizer], DECAY),), arms, pretraining)


FINE_TUNING = grid("batch norm", "SGDM", ("gradient",), pretraining=BEFORE)
GRIDS = (
    *(grid(norm, "SGDM") for norm in NORMS),
    grid("batch norm", "Adam"),
    grid("group norm", "Adam", ("gradient",)),
    grid("no norm", "AdamW", ("gradient", "update")),
    FINE_TUNING,
)


def in_jax(of: Grid) -> dict[str, training.Trained]:
    """One run of each arm of one of the grids."""
    return _all_in_jax()[GRIDS.index(of)]


@cache
def _all_in_jax() -> list[dict[str, training.Trained]]:
    """Train all in one program: compiled one by one, they take twice as long."""

    def runs(starts: list[Start]) -> list[dict[str, training.Trained]]:
        return [
            {arm: training.train(of, arm, start, *of.cells[0]) for arm in of.arms}
            for of, start in zip(GRIDS, starts, strict=True)
        ]

    starts = [training.start_of(of, SEED) for of in GRIDS]
    return jax.tree.map(np.asarray, jax.jit(runs)(starts))


def in_torch(of: Grid, arm: str) -> on_torch.Trained:
    """One run."""
    return on_torch.train(of, arm, SEED, *of.cells[0])
