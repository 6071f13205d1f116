"""The study on digits, from the runs to the sections of the report."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

from benchmarks.paper import theory
from benchmarks.paper.agreement import torch_table
from benchmarks.paper.energy import energy_table
from benchmarks.paper.grids import ADAM_RATE, IN_JAX, IN_TORCH, RATE, STUDIES, brief
from benchmarks.paper.report import (
    Write,
    as_map,
    as_places,
    as_rates,
    as_table1,
    as_table2,
    write_comparisons,
    write_section,
)
from benchmarks.paper.study import Results, is_done, results, run
from benchmarks.paper.theory_plots import draw

__all__ = ["sections"]

LIBRARIES, ENERGY, THEORY = "libraries", "energy", "theory"

# What stands for the paper's middle learning rates, in each network.
MIDDLE_RATES = {name: {"SGDM": RATE, "Adam": adam} for name, adam in ADAM_RATE.items()}

WRITERS: dict[str, Write] = {
    "table1": as_table1,
    "table2": partial(as_table2, rates=MIDDLE_RATES),
    "places": as_places,
    "rates": as_rates,
}


def sections(
    parts: Collection[str], folder: Path, *, seeds: int | None = None, hardly: bool = False
) -> Iterator[Path]:
    """Run what is left to run, and write the sections of the report, one after the other.

    Parameters
    ----------
    parts : collection of str
        Names of `STUDIES`, `LIBRARIES`, `ENERGY` and `THEORY`.
    seeds : int, optional
        In each cell. Default: as many as each study has.
    hardly : bool
        Only some of it, with few steps, to see that it runs.
    """
    every = [*STUDIES, IN_JAX, IN_TORCH]
    if hardly:
        every = [*map(brief, every)]
    *of_grids, in_jax, in_torch = every
    studies = [study for study in of_grids if study.name in parts]
    both = [in_jax, in_torch] if LIBRARIES in parts else []
    runs = folder / "runs"
    run([*studies, *both], runs, seeds=seeds)
    found = {study.name: results(study, runs, seeds=seeds) for study in (*studies, *both)}
    for study in studies:
        writer = WRITERS.get(study.name, as_map)
        outcomes = found[study.name].outcomes
        yield write_comparisons(study.title, study.name, outcomes, folder, writer)
    if both:
        table = torch_table(*(found[study.name].outcomes for study in both))
        yield write_section(IN_TORCH.title, LIBRARIES, [table], folder)
    if ENERGY in parts:
        yield write_section("What GC removes at the start", ENERGY, energy_table(), folder)
    if THEORY in parts:
        yield from draw(folder, theory.BRIEF if hardly else theory.WHOLE)
    done = [study for study in every if is_done(study, runs, seeds=seeds)]
    if done:
        yield _write_machine({s.name: results(s, runs, seeds=seeds) for s in done}, folder)


def _write_machine(found: Mapping[str, Results], folder: Path) -> Path:
    """Say where and how long it ran, apart from what came out, which is the same everywhere."""
    minutes = ", ".join(f"{name} {results.seconds / 60:.0f}" for name, results in found.items())
    machines = dict.fromkeys(name for results in found.values() for name in results.machines)
    path = folder / "machine.md"
    path.write_text(
        f"Trained on {'; '.join(machines)}. Minutes of one core: {minutes}.\n", encoding="utf-8"
    )
    return path
