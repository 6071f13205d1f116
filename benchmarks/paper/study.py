"""Run studies on all cores: a process a program, and a file of outcomes for each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from time import process_time
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks.paper import on_torch, store, training
from benchmarks.paper.cells import Outcome
from benchmarks.paper.grids import Study
from benchmarks.paper.training import Grid

__all__ = ["Results", "cores", "results", "run"]


class _Program(NamedTuple):
    """Work for one process."""

    path: Path
    library: str
    grids: tuple[Grid, ...]
    seeds: tuple[int, ...]

    def key(self) -> str:
        """Say what was asked: outcomes of another question are not taken for these."""
        return repr((self.grids, self.seeds))

    def is_done(self) -> bool:
        return self.path.exists() and store.load(self.path)[1]["key"] == self.key()


class Results(NamedTuple):
    """Of a study: its outcomes, and the seconds of one core that they took."""

    outcomes: list[Outcome]
    seconds: float


def run(studies: Sequence[Study], folder: Path, *, seeds: int | None = None) -> None:
    """Run what `folder` does not hold yet, with so many seeds or those that each study has."""
    programs = [program for study in studies for program in _programs(study, folder, seeds)]
    missing = [program for program in programs if not program.is_done()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        cores(), context, initializer=_use_one_thread, max_tasks_per_child=1
    ) as pool:
        futures = [pool.submit(_run, program) for program in missing]
        for future in tqdm(_finished(futures), "programs", len(futures), disable=None):
            future.result()


def results(study: Study, folder: Path, *, seeds: int | None = None) -> Results:
    """Read what `run` left in the folder.

    Raises
    ------
    ValueError
        If it does not hold all outcomes of the study.
    """
    programs = _programs(study, folder, seeds)
    for program in programs:
        if not program.is_done():
            msg = f"{program.path} does not hold the outcomes of this study; run it first"
            raise ValueError(msg)
    loaded = [store.load(program.path) for program in programs]
    return Results(
        [outcome for outcomes, _ in loaded for outcome in outcomes],
        sum(about["seconds"] for _, about in loaded),
    )


def _programs(study: Study, folder: Path, seeds: int | None) -> list[_Program]:
    chosen = tuple(range(seeds or study.seeds))
    return [
        _Program(folder / f"{study.name}-{index}.npz", study.library, grids, chosen)
        for index, grids in enumerate(study.programs)
    ]


def _use_one_thread() -> None:
    """Keep libraries from sharing matrices too small for that between threads."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"  # read when JAX first computes
    torch.set_num_threads(1)


def _run(program: _Program) -> None:
    start = process_time()  # of this process alone, however busy the machine is
    found = _OUTCOMES[program.library](program.grids, program.seeds)
    store.save(program.path, found, key=program.key(), seconds=process_time() - start)


def _finished(futures: Sequence[Future[None]]) -> Iterator[Future[None]]:
    """As they come; an error ends the rest."""
    try:
        yield from as_completed(futures)
    finally:
        for future in futures:
            future.cancel()


_OUTCOMES = {"jax": training.outcomes, "torch": on_torch.outcomes}


def cores() -> int:
    """Count those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
