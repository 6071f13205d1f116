"""Means of the weights along training, and units that are never active, with GC and without.

Shvetsov et al., "Bug or Feature^2: Weight Drift, Activation Sparsity, and Spikes"
(arXiv 2605.17659), find that weights behind a ReLU drift below zero early in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks.paper.cells import BASE
from benchmarks.paper.grids import BRIEF_STEPS, DECAY
from benchmarks.paper.labels import ARM_WORDS, describe
from benchmarks.paper.markdown import interval, p_value, table
from benchmarks.paper.network import Network, Statistics, Weights
from benchmarks.paper.other_grids import MNIST_SETTINGS, TUNED
from benchmarks.paper.report import write_section
from benchmarks.paper.statistics import paired
from benchmarks.paper.style import ARM_COLORS, save
from benchmarks.paper.training import Grid, start_of, train

__all__ = ["Watched", "watch", "write_drift"]

ARMS = (BASE, "gradient")
LOOKS = 12
SEEDS = range(10)
IMAGES = 256  # of the test part


@dataclass(frozen=True)
class Watched:
    """Values along the runs of one arm, in percent, each an array (seeds, looks).

    Attributes
    ----------
    mean : array
        Mean weight of the units that have a ReLU before them, averaged over these units, as a part
        of the standard deviation of all their weights at the start.
    dead : array
        Share of the units with a ReLU behind them that no test image activates.
    zeros : array
        Share of the outputs of all ReLUs that are 0.
    """

    mean: Any
    dead: Any
    zeros: Any


def watch(network: Network, grid: Grid, seeds: Sequence[int]) -> dict[str, Watched]:
    """Train each arm with each seed, and look at the start and at each checkpoint."""
    images = jnp.asarray(grid.task.test().x[:IMAGES])

    def look(weights: Weights, statistics: Statistics) -> Any:
        _, _, shares = network.look(weights, statistics, images, training=False)
        share = jnp.concatenate(shares)
        return _means(weights), (share == 0).mean(), 1 - share.mean()

    def runs(starts: Any) -> Any:
        def run(start: Any) -> Any:
            first = look(start.weights, start.statistics)
            spread = _spread(start.weights)
            found = {}
            for arm in grid.arms:
                seen = train(grid, arm, start, *grid.cells[0], look=look).seen
                means, dead, zeros = map(jnp.append, first, seen)
                found[arm] = 100 * means / spread, 100 * dead, 100 * zeros
            return found

        return jax.lax.map(run, starts)

    starts = [start_of(grid, seed) for seed in seeds]
    found = jax.jit(runs)(jax.tree.map(lambda *leaves: np.stack(leaves), *starts))
    return {arm: Watched(*map(np.asarray, seen)) for arm, seen in found.items()}


def write_drift(folder: Path, *, hardly: bool = False) -> Iterator[Path]:
    """Train, and write the picture and the table."""
    seeds = SEEDS[:2] if hardly else SEEDS
    found = {}
    for task, network in MNIST_SETTINGS[:2]:
        rate = TUNED[task, network, "SGDM"]
        longer = replace(task, checkpoints=LOOKS, steps=BRIEF_STEPS if hardly else task.steps)
        grid = Grid(longer, network, "SGDM", ((rate, DECAY),), ARMS)
        found[describe(grid.cell(0), ("task", "network", "learning_rate"))] = watch(
            network, grid, seeds
        )
    _draw(found, grid.task.steps, folder / "drift.svg")
    lines = [*_lines(found), "", "![Means of the weights, and inactive units](drift.svg)"]
    yield write_section("Weight drift", "drift", lines, folder)


def _kernels_behind_relu(weights: Weights) -> list[Any]:
    """All but the stem's, whose inputs are the images."""
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    return [leaf for path, leaf in leaves if path[-1].key == "kernel" and path[0].key != "stem"]


def _means(weights: Weights) -> Any:
    units = [kernel.reshape(-1, kernel.shape[-1]) for kernel in _kernels_behind_relu(weights)]
    return jnp.concatenate([unit.mean(0) for unit in units]).mean()


def _spread(weights: Weights) -> Any:
    return jnp.concatenate([kernel.ravel() for kernel in _kernels_behind_relu(weights)]).std()


# What is watched: its title and how a value is written.
_WATCHED = {
    "mean": "mean weight of the units\n(% of the deviation at the start)",
    "dead": "ReLU units that\nno image activates (%)",
    "zeros": "zeros among the outputs\nof all ReLUs (%)",
}


def _draw(found: Mapping[str, Mapping[str, Watched]], steps: int, path: Path) -> None:
    figure = Figure(figsize=(4.1, 2.1 * len(_WATCHED)), layout="constrained")
    panels = figure.subplots(len(_WATCHED), len(found), squeeze=False, sharey="row")
    for column, (name, runs) in zip(panels.T, found.items(), strict=True):
        for axes, quantity in zip(column, _WATCHED, strict=True):
            for arm, watched in runs.items():
                values = getattr(watched, quantity)
                x = np.linspace(0, steps, values.shape[1])
                low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
                color = ARM_COLORS[arm]
                axes.plot(x, middle, color=color, label=ARM_WORDS[arm])
                axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
            axes.grid(alpha=0.3)
        column[0].set_title(name.split(", ")[-2], fontsize="medium")
        column[-1].set(xlabel="step")
        column[1].set_ylim(0, max(5, column[1].get_ylim()[1]))  # of the dead: a scale for none
    for axes, title in zip(panels[:, 0], _WATCHED.values(), strict=True):
        axes.set_ylabel(title, fontsize="small")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1, frameon=False)
    save(figure, path)


def _lines(found: Mapping[str, Mapping[str, Watched]]) -> Iterator[str]:
    yield (
        "Median over the runs at the start and after training, and the mean paired difference "
        "after training with its 95% interval. Units: those of all convolutions but the stem, "
        f"and of the head. {IMAGES} test images. In the picture, lines are medians of the runs, "
        "and bands lie between the quartiles."
    )
    yield ""
    rows = []
    for name, runs in found.items():
        for quantity, title in _WATCHED.items():
            base, other = (getattr(runs[arm], quantity) for arm in ARMS)
            difference = paired(other[:, -1].astype(np.float64) - base[:, -1])
            start, *ends = (np.median(v) for v in (base[:, 0], base[:, -1], other[:, -1]))
            rows.append(
                [
                    *(name, title.replace("\n", " ")),
                    *(f"{value:.2f}" for value in (start, *ends)),
                    *(interval(difference), p_value(difference.p)),
                ]
            )
    header = ["run", "", "start", *(ARM_WORDS[arm] for arm in ARMS), "difference", "p (t)"]
    yield from table(header, rows)
