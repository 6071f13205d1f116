"""The training runs: every network, in every framework, from every seed, with GC and without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import NamedTuple, cast

from benchmarks.command.attempt import attempt
from benchmarks.command.double_precision import double_precision
from benchmarks.command.left_out import LeftOut
from benchmarks.command.libraries import INSTALL
from benchmarks.command.progress import track
from benchmarks.demo import problem
from benchmarks.demo.training import Framework, Trace, train

__all__ = ["Run", "find_frameworks", "train_all"]

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
