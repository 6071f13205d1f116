"""All runs of a grid, with Gradient Centralization and without, in one compiled program of JAX.

The program goes through the runs one after the other (`jax.lax.map`). With `jax.vmap` over the
weights a run takes twice as long, as products with a batch of matrices are slow on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gcx.optax
from benchmarks.paper.cells import BASE, Cell, Outcome
from benchmarks.paper.digits import BATCH, Draw, Images, Task
from benchmarks.paper.network import Network, Statistics, Weights

__all__ = ["ARMS", "Grid", "Trained", "optimizer", "outcomes", "train"]

Layouts = dict[str, str | None]

CHECKPOINTS = 12
MOMENTUM = 0.9

# Which weights an arm centralizes, and where: the gradient with the decay in it, or the update.
EVERY_WEIGHT: Layouts = {"*kernel": "...o"}
CONVOLUTIONS: Layouts = {"head/kernel": None, "*kernel": "...o"}
ARMS: dict[str, tuple[Layouts, str]] = {
    BASE: ({}, ""),
    "gradient": (EVERY_WEIGHT, "gradient"),
    "update": (EVERY_WEIGHT, "update"),
    "conv only": (CONVOLUTIONS, "gradient"),
}

RULES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "SGDM": partial(optax.trace, decay=MOMENTUM),
    "Adam": optax.scale_by_adam,
    "AdamW": optax.scale_by_adam,
}


@dataclass(frozen=True)
class Grid:
    """Cells of one task, network and optimizer: pairs of learning rate and weight decay."""

    task: Task
    network: Network
    optimizer: str
    cells: tuple[tuple[float, float], ...]
    arms: tuple[str, ...] = (BASE, "gradient")
    pretraining: Task | None = None

    def cell(self, index: int) -> Cell:
        """Name a cell as the tables do."""
        return Cell(self.task.name, self.network.name, self.optimizer, *self.cells[index])

    @property
    def checkpoints(self) -> Any:
        """After how many steps the accuracy is taken."""
        return np.arange(1, CHECKPOINTS + 1) * (self.task.steps // CHECKPOINTS)


class Start(NamedTuple):
    """What a seed decides of a run."""

    weights: Weights
    statistics: Statistics
    draw: Draw
    pretraining: Draw | None


class Trained(NamedTuple):
    """Loss of each step, test images classified right at each checkpoint, and what was learned."""

    loss: Any
    right: Any
    weights: Weights
    statistics: Statistics


def outcomes(grids: Sequence[Grid], seeds: Sequence[int]) -> list[Outcome]:
    """Train all arms of all cells with all seeds, in one program."""
    starts = [_stacked([_start(grid, seed) for seed in seeds]) for grid in grids]
    results = jax.jit(partial(_all_runs, grids))(starts)
    return [
        Outcome(
            cell=grid.cell(index),
            arm=arm,
            seeds=tuple(seeds),
            accuracy=100 * np.asarray(arms[arm].right, np.float64)[index] / len(grid.task.test().y),
            loss=np.asarray(arms[arm].loss, np.float64)[index],
            checkpoints=grid.checkpoints,
        )
        for grid, arms in zip(grids, results, strict=True)
        for index in range(len(grid.cells))
        for arm in grid.arms
    ]


def optimizer(
    name: str, arm: str, learning_rate: Any, weight_decay: Any, steps: int
) -> optax.GradientTransformation:
    """SGDM, Adam or AdamW as in torch: the weight decay is part of the gradient, but for AdamW.

    The learning rate falls tenfold after 30, 60 and 90% of the steps: in the paper after 60, 120
    and 180 of 200 epochs.
    """
    weights, where = ARMS[arm]

    def centralized(here: str) -> optax.GradientTransformation:
        return gcx.optax.centralize(weights) if where == here else optax.identity()

    def schedule(step: Any) -> Any:
        return learning_rate * 0.1 ** (step // (0.3 * steps))

    decay = optax.add_decayed_weights(weight_decay)
    gradient = (centralized("gradient"), RULES[name]())
    return optax.chain(
        *((*gradient, decay) if name == "AdamW" else (decay, *gradient)),
        optax.scale_by_learning_rate(schedule),
        centralized("update"),
    )


def train(grid: Grid, arm: str, start: Start, learning_rate: Any, weight_decay: Any) -> Trained:
    """One run, to be traced."""
    weights = start.weights
    if grid.pretraining is not None and start.pretraining is not None:
        base = optimizer(grid.optimizer, BASE, *grid.cells[0], grid.pretraining.steps)
        before = _fit(grid.network, grid.pretraining, base, start, start.pretraining)
        weights = {**before.weights, "head": start.weights["head"]}
        start = start._replace(weights=weights, statistics=before.statistics)
    rule = optimizer(grid.optimizer, arm, learning_rate, weight_decay, grid.task.steps)
    return _fit(grid.network, grid.task, rule, start, start.draw)


def _fit(
    network: Network, task: Task, rule: optax.GradientTransformation, start: Start, draw: Draw
) -> Trained:
    images = jnp.asarray(task.train().x)

    def loss(weights: Weights, statistics: Statistics, batch: Any) -> tuple[Any, Statistics]:
        logits, after = network(weights, statistics, images[batch], training=True)
        labels = draw.labels[batch]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), after

    def step(carry: Any, batch: Any) -> Any:
        weights, statistics, state = carry
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, statistics), grads = gradient(weights, statistics, batch)
        updates, state = rule.update(grads, state, weights)
        return (optax.apply_updates(weights, updates), statistics, state), value

    def until_checkpoint(carry: Any, batches: Any) -> Any:
        carry, losses = jax.lax.scan(step, carry, batches)
        return carry, (losses, _count_right(network, task, *carry[:2]))

    carry = (start.weights, start.statistics, rule.init(start.weights))
    batches = draw.batches.reshape(CHECKPOINTS, -1, draw.batches.shape[-1])
    carry, (losses, right) = jax.lax.scan(until_checkpoint, carry, batches)
    return Trained(losses.reshape(-1), right, carry[0], carry[1])


def _count_right(network: Network, task: Task, weights: Weights, statistics: Statistics) -> Any:
    """Classify the test images batch by batch, which stays in the caches of a CPU."""
    test = task.test()
    missing = -len(test.y) % BATCH
    x = np.pad(test.x, ((0, missing), (0, 0), (0, 0), (0, 0)))
    y = np.pad(test.y, (0, missing), constant_values=-1)  # no class: never right

    def right(batch: Images) -> Any:
        logits, _ = network(weights, statistics, batch.x, training=False)
        return (logits.argmax(1) == batch.y).sum()

    batches = Images(x.reshape(-1, BATCH, *x.shape[1:]), y.reshape(-1, BATCH))
    return jax.lax.map(right, batches).sum()


def _start(grid: Grid, seed: int) -> Start:
    pretraining = grid.pretraining.draw(seed) if grid.pretraining else None
    return Start(*grid.network.start(seed), grid.task.draw(seed), pretraining)


def _stacked(starts: Sequence[Start]) -> Start:
    """Arrays (seeds, ...)."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *starts)  # type: ignore[no-any-return]


def _all_runs(grids: Sequence[Grid], starts: Sequence[Start]) -> list[dict[str, Trained]]:
    return [_runs(grid, start) for grid, start in zip(grids, starts, strict=True)]


def _runs(grid: Grid, starts: Start) -> dict[str, Trained]:
    """Arrays (cells, seeds, ...) of each arm."""
    seeds = len(starts.draw.batches)
    learning_rates, weight_decays = jnp.asarray(grid.cells, jnp.float32).T

    def arms(index: Any) -> dict[str, Trained]:
        cell, seed = index // seeds, index % seeds
        start = jax.tree.map(lambda leaf: leaf[seed], starts)
        return {
            arm: train(grid, arm, start, learning_rates[cell], weight_decays[cell])
            for arm in grid.arms
        }

    runs = jax.lax.map(arms, jnp.arange(len(grid.cells) * seeds))
    return jax.tree.map(  # type: ignore[no-any-return]
        lambda leaf: leaf.reshape(len(grid.cells), seeds, *leaf.shape[1:]), runs
    )
