"""Run studies on all cores: a process a program, and a file of outcomes for each."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from time import process_time
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.paper import store
from benchmarks.paper.cells import Outcome
from benchmarks.paper.data import BLOCK, MOST_TEST, MOST_TRAIN, PATCH, PIXELS_A_CLASS, TEST_PART
from benchmarks.paper.grids import Study
from benchmarks.paper.labels import as_file_name
from benchmarks.paper.network import EPSILON, GROUPS, RUNNING
from benchmarks.paper.tasks import BATCH
from benchmarks.paper.training import MOMENTUM, Grid
from benchmarks.throughput.timing import machine

__all__ = ["Results", "is_done", "results", "run"]


class _Program(NamedTuple):
    """Work for one process: studies that have it in common have its outcomes in common."""

    library: str
    grids: tuple[Grid, ...]
    seeds: tuple[int, ...]

    def path(self, folder: Path) -> Path:
        """Where its outcomes are: with anything else asked, or another setting, somewhere else."""
        asked = repr((_SETTING, self))
        first = self.grids[0]
        words = (first.task.name, first.network.name, first.optimizer, self.library)
        name = as_file_name(" ".join(words))
        return folder / f"{name}-{sha256(asked.encode()).hexdigest()[:12]}.npz"

    @property
    def runs(self) -> int:
        """Count the trainings."""
        return sum(len(grid.cells) * len(grid.arms) for grid in self.grids) * len(self.seeds)


# What outcomes depend on beside the grid.
_PIXELS = (PATCH, BLOCK, PIXELS_A_CLASS, MOST_TRAIN, MOST_TEST)
_SETTING = (BATCH, TEST_PART, _PIXELS, MOMENTUM, RUNNING, GROUPS, EPSILON)


class Results(NamedTuple):
    """Of a study: its outcomes, the seconds of one core that they took, and on which machines."""

    outcomes: list[Outcome]
    seconds: float
    machines: list[str]


def run(studies: Sequence[Study], folder: Path, *, seeds: int | None = None) -> None:
    """Run what `folder` does not hold yet, with so many seeds or those that each study has."""
    programs = dict.fromkeys(program for study in studies for program in _programs(study, seeds))
    missing = [program for program in programs if not program.path(folder).exists()]
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(_cores(), context, initializer=_prepare, max_tasks_per_child=1) as pool,
        _ends_at_once(),
    ):
        runs = {pool.submit(_run, program, folder): program.runs for program in missing}
        with tqdm(desc="trainings", total=sum(runs.values()), disable=not runs) as progress:
            for finished in _finished([*runs]):
                for future in finished:
                    future.result()
                    progress.update(runs[future])
                progress.refresh()  # its clock, also while no program ends


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
    first = study.first_seed
    chosen = tuple(range(first, first + (seeds or study.seeds)))
    return [_Program(study.library, grids, chosen) for grids in study.programs]


@contextmanager
def _ends_at_once() -> Iterator[None]:
    """At Ctrl-C, end the programs that are running: the pool would wait for them."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; programs that were finished are kept", file=sys.stderr)
        for child in multiprocessing.active_children():
            child.kill()
        raise


def _prepare() -> None:
    """Keep libraries from sharing matrices too small for that between threads."""
    signal(SIGINT, SIG_IGN)  # the parent ends this process
    flags = os.environ.get("XLA_FLAGS", "")  # read when JAX first computes
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch


def _run(program: _Program, folder: Path) -> None:
    start = process_time()  # of this process alone, however busy the machine is
    train = import_module(_MODULES[program.library])  # no process needs both
    found = train.outcomes(program.grids, program.seeds)
    about = {"seconds": process_time() - start, "machine": f"{machine()}, {_cores()} cores"}
    store.save(program.path(folder), found, **about)


def _finished(futures: Sequence[Future[None]]) -> Iterator[set[Future[None]]]:
    """As they come, or none after some seconds; an error ends the rest."""
    left = set(futures)
    try:
        while left:
            found, left = wait(left, timeout=5, return_when=FIRST_COMPLETED)
            yield found
    finally:
        for future in futures:
            future.cancel()


_MODULES = {"jax": "benchmarks.paper.training", "torch": "benchmarks.paper.on_torch"}


def _cores() -> int:
    """Count those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
