"""The training loop, which is the same for every framework, and what it writes down."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from benchmarks.demo.problem import Problem

__all__ = ["LEARNING_RATE", "MOMENTUM", "Framework", "Trace", "Trainer", "train"]

LEARNING_RATE = 0.1
MOMENTUM = 0.9


class Trainer(Protocol):
    """A network and its optimizer in one framework."""

    def step(self, images: Any, labels: Any, /) -> float:
        """Take one step of training; return the loss before it."""

    def predict(self, images: Any, /) -> Any:
        """Tell the digit in each image."""

    def kernels(self) -> Sequence[Any]:
        """Give the weights as NumPy arrays, output units last."""


class Framework(Protocol):
    """What the file of a framework provides."""

    NETWORKS: Collection[str]

    def trainer(self, problem: Problem, *, centralize: bool) -> Trainer:
        """Set up a network with the weights of `problem`, and SGD with momentum."""


@dataclass(frozen=True)
class Trace:
    """A training run: a loss and a drift for each step, and the accuracy at its end."""

    losses: tuple[float, ...]
    drift: tuple[float, ...]  # largest change of any unit's mean weight since the start
    accuracy: float


def train(trainer: Trainer, problem: Problem) -> Trace:
    """Take one step for each batch of the problem, then test."""
    start = _fan_in_means(trainer)
    losses, drift = [], []
    for batch in problem.batches:
        losses.append(trainer.step(problem.train.images[batch], problem.train.labels[batch]))
        changes = np.abs(_fan_in_means(trainer) - start)
        drift.append(float(np.max(changes)))
    hits = trainer.predict(problem.test.images) == problem.test.labels
    return Trace(tuple(losses), tuple(drift), float(np.mean(hits)))


def _fan_in_means(trainer: Trainer) -> Any:
    """Mean of the weights of each output unit: 1^T w / M in the paper."""
    means = [np.mean(k, axis=tuple(range(k.ndim - 1)), dtype=float) for k in trainer.kernels()]
    return np.concatenate(means)
