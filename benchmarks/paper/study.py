"""Run studies on all cores: a process a program, and a file of outcomes for each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from hashlib import sha256
from pathlib import Path
from time import process_time
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks.paper import on_torch, store, training
from benchmarks.paper.cells import Outcome
from benchmarks.paper.digits import BATCH, TEST_PART
from benchmarks.paper.grids import Study
from benchmarks.paper.network import EPSILON, GROUPS, RUNNING
from benchmarks.paper.training import CHECKPOINTS, MOMENTUM, Grid
from benchmarks.throughput.timing import machine

__all__ = ["Results", "is_done", "results", "run"]


class _Program(NamedTuple):
    """Work for one process."""

    name: str
    library: str
    grids: tuple[Grid, ...]
    seeds: tuple[int, ...]

    def path(self, folder: Path) -> Path:
        """Where its outcomes are: with anything else asked, or another setting, somewhere else."""
        asked = repr((_SETTING, self.grids, self.seeds))
        return folder / f"{self.name}-{sha256(asked.encode()).hexdigest()[:12]}.npz"


# What outcomes depend on beside the grid.
_SETTING = (BATCH, TEST_PART, CHECKPOINTS, MOMENTUM, RUNNING, GROUPS, EPSILON)


class Results(NamedTuple):
    """Of a study: its outcomes, the seconds of one core that they took, and on which machines."""

    outcomes: list[Outcome]
    seconds: float
    machines: list[str]


def run(studies: Sequence[Study], folder: Path, *, seeds: int | None = None) -> None:
    """Run what `folder` does not hold yet, with so many seeds or those that each study has."""
    programs = [program for study in studies for program in _programs(study, seeds)]
    missing = [program for program in programs if not program.path(folder).exists()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        _cores(), context, initializer=_use_one_thread, max_tasks_per_child=1
    ) as pool:
        futures = [pool.submit(_run, program, folder) for program in missing]
        for future in tqdm(_finished(futures), "programs", len(futures), disable=None):
            future.result()


def is_done(study: Study, folder: Path, *, seeds: int | None = None) -> bool:
    """Whether the folder holds all outcomes of the study."""
    return all(program.path(folder).exists() for program in _programs(study, seeds))


def results(study: Study, folder: Path, *, seeds: int | None = None) -> Results:
    """Read what `run` left in the folder; errors as `store.load`."""
    loaded = [store.load(program.path(folder)) for program in _programs(study, seeds)]
    return Results(
        [outcome for outcomes, _ in loaded for outcome in outcomes],
        sum(about["seconds"] for _, about in loaded),
        list(dict.fromkeys(about["machine"] for _, about in loaded)),
    )


def _programs(study: Study, seeds: int | None) -> list[_Program]:
    chosen = tuple(range(seeds or study.seeds))
    return [
        _Program(f"{study.name}-{index}", study.library, grids, chosen)
        for index, grids in enumerate(study.programs)
    ]


def _use_one_thread() -> None:
    """Keep libraries from sharing matrices too small for that between threads."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"  # read when JAX first computes
    torch.set_num_threads(1)


def _run(program: _Program, folder: Path) -> None:
    start = process_time()  # of this process alone, however busy the machine is
    found = _OUTCOMES[program.library](program.grids, program.seeds)
    about = {"seconds": process_time() - start, "machine": f"{machine()}, {_cores()} cores"}
    store.save(program.path(folder), found, **about)


def _finished(futures: Sequence[Future[None]]) -> Iterator[Future[None]]:
    """As they come; an error ends the rest."""
    try:
        yield from as_completed(futures)
    finally:
        for future in futures:
            future.cancel()


_OUTCOMES = {"jax": training.outcomes, "torch": on_torch.outcomes}


def _cores() -> int:
    """Count those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
