"""The training loop, the same for every framework, and all the runs of it that are compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from benchmarks.command.libraries import LeftOut, double_precision
from benchmarks.command.progress import track
from benchmarks.demo import problem
from benchmarks.demo.problem import Problem
from gcx.__main__ import INSTALL, attempt

__all__ = [
    "LEARNING_RATE",
    "MOMENTUM",
    "Framework",
    "Run",
    "Trace",
    "Trainer",
    "find_frameworks",
    "train",
    "train_all",
]

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


# What each of the files needs.
_MODULES = {"numpy": ["numpy"], "torch": ["torch"], "jax": ["jax", "optax"]}


class Run(NamedTuple):
    """Which training run."""

    network: str
    framework: str
    centralize: bool
    seed: int


def find_frameworks() -> tuple[dict[str, Framework], list[LeftOut]]:
    """Load the frameworks that are installed, and say which are not."""
    found, left_out = {}, []
    for name, modules in _MODULES.items():
        missing = [module for module in modules if find_spec(module) is None]
        if missing:
            why = f"{' and '.join(missing)} not installed: {INSTALL[name]}"
            left_out.append(LeftOut(True, name, why))
            continue
        loaded, error = attempt(partial(import_module, f"benchmarks.demo.on_{name}"))
        if error:
            left_out.append(LeftOut(False, name, error))
        else:
            found[name] = cast("Framework", loaded)
    return found, left_out


def train_all(
    frameworks: Mapping[str, Framework], seeds: Sequence[int], steps: int
) -> dict[Run, Trace]:
    """Train everything; runs of one network and seed share their weights and batches."""
    planned = [
        Run(network, name, centralize, seed)
        for network, seed in product(problem.NETWORKS, seeds)
        for name, framework in frameworks.items()
        if network in framework.NETWORKS
        for centralize in (True, False)
    ]
    with double_precision(frameworks):
        return {
            run: _train(frameworks[run.framework], run, steps) for run in track(planned, "training")
        }


def _train(framework: Framework, run: Run, steps: int) -> Trace:
    task = problem.make(run.network, run.seed, steps)
    return train(framework.trainer(task, centralize=run.centralize), task)
