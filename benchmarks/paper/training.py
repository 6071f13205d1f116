"""All runs of a grid, with Gradient Centralization and without, in one compiled program of JAX.

The program goes through the runs one after the other (`jax.lax.map`). With `jax.vmap` over the
weights a run takes twice as long, as products with a batch of matrices are slow on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gcx.optax
from benchmarks.paper.cells import BASE, Cell, Outcome
from benchmarks.paper.data import Parts, parts
from benchmarks.paper.network import Statistics, Weights
from benchmarks.paper.tasks import BATCH, Draw, Task

__all__ = ["ARMS", "Grid", "Learner", "Trained", "optimizer", "outcomes", "start_of", "train"]

Layouts = dict[str, str | None]
Look = Callable[[Weights, Statistics], Any]

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


class Learner(Protocol):
    """`Network`, or another whose weights are in a nested dict, all kernels with outputs last."""

    @property
    def name(self) -> str:
        """Name it as tables do."""

    def start(self, seed: int) -> tuple[Weights, Statistics]:
        """Draw initial weights, in NumPy."""

    def __call__(
        self, weights: Weights, statistics: Statistics, x: Any, *, training: bool
    ) -> tuple[Any, Statistics]:
        """Return outputs (n, outputs), and the statistics after this batch."""


@dataclass(frozen=True)
class Grid:
    """Cells of one task, network and optimizer: pairs of learning rate and weight decay."""

    task: Task
    network: Learner
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
        return np.arange(1, self.task.checkpoints + 1) * (self.task.steps // self.task.checkpoints)


class Start(NamedTuple):
    """What a seed decides of a run."""

    weights: Weights
    statistics: Statistics
    draw: Draw
    pretraining: Draw | None


class Trained(NamedTuple):
    """Loss of each step, what was seen at each checkpoint, and what was learned."""

    loss: Any
    seen: Any
    weights: Weights
    statistics: Statistics


def outcomes(grids: Sequence[Grid], seeds: Sequence[int]) -> list[Outcome]:
    """Train all arms of all cells with all seeds, in one program."""
    starts = [_stacked([start_of(grid, seed) for seed in seeds]) for grid in grids]
    data = {grid.task.data: parts(grid.task.data) for grid in grids}
    results = jax.jit(partial(_all_runs, grids))(starts, data)
    return [
        Outcome(
            cell=grid.cell(index),
            arm=arm,
            seeds=tuple(seeds),
            accuracy=_percent(grid.task, np.asarray(arms[arm].seen, np.float64)[index]),
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


def train(
    grid: Grid,
    arm: str,
    start: Start,
    learning_rate: Any,
    weight_decay: Any,
    *,
    data: Parts | None = None,
    look: Look | None = None,
) -> Trained:
    """One run, to be traced; large data comes as an argument, as it would be compiled in.

    At each checkpoint `look` sees the weights; without it the right answers are counted.
    """
    data = data or parts(grid.task.data)
    weights = start.weights
    if grid.pretraining is not None and start.pretraining is not None:
        base = optimizer(grid.optimizer, BASE, *grid.cells[0], grid.pretraining.steps)
        there = start._replace(draw=start.pretraining)
        before = _fit(grid.network, grid.pretraining, base, there, data=data)
        weights = {**before.weights, "head": start.weights["head"]}
        start = start._replace(weights=weights, statistics=before.statistics)
    rule = optimizer(grid.optimizer, arm, learning_rate, weight_decay, grid.task.steps)
    return _fit(grid.network, grid.task, rule, start, data=data, look=look)


def _fit(
    network: Learner,
    task: Task,
    rule: optax.GradientTransformation,
    start: Start,
    *,
    data: Parts,
    look: Look | None = None,
) -> Trained:
    samples, draw = jnp.asarray(data.train.x), start.draw
    look = look or partial(_count_right, network, task, data)

    def loss(weights: Weights, statistics: Statistics, batch: Any) -> tuple[Any, Statistics]:
        outputs, after = network(weights, statistics, samples[batch], training=True)
        labels = draw.labels[batch]
        if not task.classes:
            return jnp.square(outputs[:, 0] - labels).mean(), after
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean(), after

    def step(carry: Any, batch: Any) -> Any:
        weights, statistics, state = carry
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, statistics), grads = gradient(weights, statistics, batch)
        updates, state = rule.update(grads, state, weights)
        return (optax.apply_updates(weights, updates), statistics, state), value

    def until_checkpoint(carry: Any, batches: Any) -> Any:
        carry, losses = jax.lax.scan(step, carry, batches)
        return carry, (losses, look(*carry[:2]))

    carry = (start.weights, start.statistics, rule.init(start.weights))
    batches = draw.batches.reshape(task.checkpoints, -1, draw.batches.shape[-1])
    carry, (losses, seen) = jax.lax.scan(until_checkpoint, carry, batches)
    return Trained(losses.reshape(-1), seen, carry[0], carry[1])


def _count_right(
    network: Learner, task: Task, data: Parts, weights: Weights, statistics: Statistics
) -> Any:
    """Sum the scores of the test samples, batch by batch, which stays in the caches of a CPU.

    A sample scores 1 where it is classified right; in a regression, less its squared error.
    """
    chosen = task.chosen(parts(task.data).test.y)
    x, y = (jnp.asarray(values)[chosen] for values in data.test)
    missing = -len(y) % BATCH
    x = jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1)))
    is_there = jnp.pad(jnp.ones(len(y), bool), (0, missing))
    y = jnp.pad(y, (0, missing))

    def score(batch: Any) -> Any:
        x, y, is_there = batch
        outputs, _ = network(weights, statistics, x, training=False)
        scores = outputs.argmax(1) == y if task.classes else -jnp.square(outputs[:, 0] - y)
        return jnp.where(is_there, scores, 0).sum()

    batches = jax.tree.map(lambda a: a.reshape(-1, BATCH, *a.shape[1:]), (x, y, is_there))
    return jax.lax.map(score, batches).sum()


def _percent(task: Task, scores: Any) -> Any:
    """Give the accuracy; of a regression the variance explained, where 0 is that of the mean."""
    y = task.test().y
    if task.classes:
        return 100 * scores / len(y)
    explained = 100 * (1 + scores / np.square(y - y.mean(), dtype=np.float64).sum())
    return np.maximum(np.nan_to_num(explained, nan=-100.0), -100.0)


def start_of(grid: Grid, seed: int) -> Start:
    """Draw what a seed decides."""
    pretraining = grid.pretraining.draw(seed) if grid.pretraining else None
    return Start(*grid.network.start(seed), grid.task.draw(seed), pretraining)


def _stacked(starts: Sequence[Start]) -> Start:
    """Arrays (seeds, ...)."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *starts)  # type: ignore[no-any-return]


def _all_runs(
    grids: Sequence[Grid], starts: Sequence[Start], data: Mapping[str, Parts]
) -> list[dict[str, Trained]]:
    return [
        _runs(grid, start, data[grid.task.data]) for grid, start in zip(grids, starts, strict=True)
    ]


def _runs(grid: Grid, starts: Start, data: Parts) -> dict[str, Trained]:
    """Arrays (cells, seeds, ...) of each arm."""
    seeds = len(starts.draw.batches)
    learning_rates, weight_decays = jnp.asarray(grid.cells, jnp.float32).T

    def arms(index: Any) -> dict[str, Trained]:
        cell, seed = index // seeds, index % seeds
        start = jax.tree.map(lambda leaf: leaf[seed], starts)
        return {
            arm: train(grid, arm, start, learning_rates[cell], weight_decays[cell], data=data)
            for arm in grid.arms
        }

    runs = jax.lax.map(arms, jnp.arange(len(grid.cells) * seeds))
    return jax.tree.map(  # type: ignore[no-any-return]
        lambda leaf: leaf.reshape(len(grid.cells), seeds, *leaf.shape[1:]), runs
    )
