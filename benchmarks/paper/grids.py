"""What the study trains: the supplement's two tables on digits, and a map of regimes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from benchmarks.paper.cells import BASE
from benchmarks.paper.network import Network
from benchmarks.paper.tasks import ALL, FEW, Task
from benchmarks.paper.training import Grid, Learner

__all__ = [
    "ADAM_RATE",
    "ADAM_RATIOS",
    "BRIEF_STEPS",
    "CALM_RATE",
    "DECAY",
    "IN_JAX",
    "IN_TORCH",
    "NETWORKS",
    "RATE",
    "RATES",
    "SGD_RATIOS",
    "STUDIES",
    "WEIGHT_DECAYS",
    "Study",
    "brief",
]

NETWORKS = (Network("batch norm"), Network("group norm"))
TASKS = (ALL, FEW)

RATE, DECAY = 0.1, 5e-4
WEIGHT_DECAYS = (0.0, 1e-4, 2e-4, 5e-4, 1e-3)

# Near the best without GC, as the study of learning rates shows; the paper's 0.001 is too low for a
# training as short as this one. Around it as far as the paper's are around theirs.
ADAM_RATE = {"batch norm": 0.01, "group norm": 0.005}
SGD_RATIOS, ADAM_RATIOS = (0.5, 1, 2), (0.5, 1, 1.5)
RATES = tuple(ratio * RATE for ratio in SGD_RATIOS)

# Around them, from too low to too high.
WIDE_RATES = {
    "SGDM": (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4),
    "Adam": (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02),
}

BRIEF_STEPS = 12
_BRIEF_WIDTH = 8

# For what is varied one by one: below the best, so that no harder case is one of a rate too high.
CALM_RATE = 0.05
WITHOUT_NORM_RATE = 0.01


@dataclass(frozen=True)
class Study:
    """A question, and the programs that answer it: all grids of a program are compiled as one."""

    name: str
    title: str
    programs: tuple[tuple[Grid, ...], ...]
    seeds: int = 20
    library: str = "jax"
    first_seed: int = 0


def _each(grids: Iterable[Grid]) -> tuple[tuple[Grid, ...], ...]:
    """Each grid a program of its own."""
    return tuple((grid,) for grid in grids)


def _table1() -> Study:
    cells = tuple((RATE, decay) for decay in WEIGHT_DECAYS)
    grids = (Grid(task, network, "SGDM", cells) for task, network in product(TASKS, NETWORKS))
    return Study("table1", "Table 1: weight decay", _each(grids))


def _table2() -> Study:
    programs = tuple(
        tuple(
            Grid(task, network, name, _cells(rates))
            for name, rates in (("SGDM", RATES), ("Adam", _adam_rates(network)))
        )
        for task, network in product(TASKS, NETWORKS)
    )
    return Study("table2", "Table 2: learning rate", programs)


def _learning_rates() -> Study:
    """Rates from too low to too high: what GC changes where each arm has its own best one."""
    grids = (
        Grid(FEW, network, name, _cells(WIDE_RATES[name]))
        for network, name in product(NETWORKS, WIDE_RATES)
    )
    return Study("rates", "Learning rates", _each(grids), seeds=10)


def _regimes() -> Study:
    """Amount of data, label noise, depth, normalization and fine-tuning, one at a time."""
    amounts = (Task("digits, 10 images a class", 10), FEW, Task("digits, 50 images a class", 50))
    noises = (
        Task(f"digits, all images, {part:.0%} random labels", noise=part) for part in (0.2, 0.4)
    )
    varied = [
        *product((*amounts, ALL, *noises), NETWORKS),
        *((FEW, Network(network.norm, blocks)) for blocks in (2, 3) for network in NETWORKS),
    ]
    grids = [Grid(task, network, "SGDM", _cells((CALM_RATE,))) for task, network in varied]
    grids += [
        Grid(task, Network("no norm"), "SGDM", _cells((WITHOUT_NORM_RATE,))) for task in TASKS
    ]
    half = Task("digits 0 to 4", classes=(0, 1, 2, 3, 4))
    rest = Task("digits 5 to 9, 20 images a class, after 0 to 4", 20, classes=(5, 6, 7, 8, 9))
    grids += [
        Grid(rest, network, "SGDM", _cells((CALM_RATE,)), pretraining=half) for network in NETWORKS
    ]
    return Study("regimes", "Regimes", _each(grids))


def _places() -> Study:
    """Gradient or update for the adaptive optimizers, all weights or convolutions for SGDM."""
    decays = {"Adam": DECAY, "AdamW": 0.01}
    grids = [
        Grid(task, network, name, ((ADAM_RATE[network.norm], decay),), (BASE, "gradient", "update"))
        for task, network, (name, decay) in product(TASKS, NETWORKS, decays.items())
    ]
    grids += [
        Grid(task, network, "SGDM", _cells((RATE,)), (BASE, "gradient", "conv only"))
        for task, network in product(TASKS, NETWORKS)
    ]
    return Study("places", "Where, and which weights", _each(grids), seeds=10)


def _in(library: str) -> Study:
    """Cells of both tables, to be trained in two libraries."""
    programs = tuple(
        (
            Grid(FEW, network, "SGDM", _cells(RATES[:2])),
            Grid(FEW, network, "Adam", _cells((ADAM_RATE[network.norm],))),
        )
        for network in NETWORKS
    )
    return Study(f"in_{library}", "PyTorch and JAX", programs, seeds=10, library=library)


def _adam_rates(network: Network) -> tuple[float, ...]:
    return tuple(ratio * ADAM_RATE[network.norm] for ratio in ADAM_RATIOS)


def _cells(rates: Iterable[float]) -> tuple[tuple[float, float], ...]:
    return tuple((rate, DECAY) for rate in rates)


STUDIES = (_table1(), _table2(), _regimes(), _places(), _learning_rates())
IN_JAX, IN_TORCH = _in("jax"), _in("torch")


def brief(study: Study) -> Study:
    """Hardly a training: each network once, all narrow and in one program, few steps, two seeds."""
    first: dict[Learner, Grid] = {}
    for grid, *_ in study.programs:
        first.setdefault(grid.network, _hardly(grid))
    return replace(study, programs=(tuple(first.values()),), seeds=2)


def _hardly(grid: Grid) -> Grid:
    network: Any = grid.network
    task = replace(grid.task, steps=BRIEF_STEPS)
    return replace(grid, task=task, network=replace(network, width=_BRIEF_WIDTH))
