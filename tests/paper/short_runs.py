"""Trainings of a few steps in JAX and in PyTorch, from the same start."""

from __future__ import annotations

from functools import cache, partial
from operator import itemgetter
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.paper import on_torch, training
from benchmarks.paper.network import Network
from benchmarks.paper.tasks import Task
from benchmarks.paper.training import Grid

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


@cache
def in_jax(of: Grid) -> dict[str, training.Trained]:
    """One run of each arm; kept, as they take seconds to compile.

    The arms differ in their optimizers alone: one program takes each in its turn.
    """
    made = training.optimizer

    def run(start: training.Start, number: int) -> training.Trained:
        def optimizer(name: str, arm: str, *settings: float) -> optax.GradientTransformation:
            if arm != "each":
                return made(name, arm, *settings)
            rules = [made(name, arm, *settings) for arm in of.arms]
            updates = [rule.update for rule in rules]
            return optax.GradientTransformation(
                rules[0].init, lambda *given: jax.lax.switch(number, updates, *given)
            )

        with patch.object(training, "optimizer", optimizer):
            return training.train(of, "each", start, *of.cells[0])

    numbers = jnp.arange(len(of.arms))
    runs = jax.jit(lambda start: jax.lax.map(partial(run, start), numbers))
    found = jax.tree.map(np.asarray, runs(training.start_of(of, SEED)))
    return {arm: jax.tree.map(itemgetter(k), found) for k, arm in enumerate(of.arms)}


def in_torch(of: Grid, arm: str) -> on_torch.Trained:
    """One run."""
    return on_torch.train(of, arm, SEED, *of.cells[0])


kept_in_torch = cache(in_torch)
