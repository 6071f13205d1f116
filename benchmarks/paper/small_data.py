"""The study on small data, from the runs to the sections of the report."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from math import isclose
from pathlib import Path

from benchmarks.paper import drift, theory
from benchmarks.paper.agreement import torch_table
from benchmarks.paper.cells import Outcome
from benchmarks.paper.energy import energy_table
from benchmarks.paper.grids import ADAM_RATE, DECAY, IN_JAX, IN_TORCH, RATE, STUDIES, Study, brief
from benchmarks.paper.other_grids import INDIAN_PINES, KINDS, MNIST, TUNING, middle_rates
from benchmarks.paper.overview import draw_overview
from benchmarks.paper.report import (
    Write,
    as_kinds,
    as_map,
    as_places,
    as_rates,
    as_table1,
    as_table2,
    as_tuning,
    write_comparisons,
    write_section,
)
from benchmarks.paper.study import Results, is_done, results, run
from benchmarks.paper.style import marked
from benchmarks.paper.tasks import ALL, FEW
from benchmarks.paper.theory_plots import draw

__all__ = ["sections"]

LIBRARIES, ENERGY, THEORY, DRIFT = "libraries", "energy", "theory", "drift"
MARK = "a short run: its figures say nothing"

# What stands for the paper's middle learning rates, in each task and network.
MIDDLE_RATES = {
    (task.name, norm): {"SGDM": RATE, "Adam": adam}
    for task in (ALL, FEW)
    for norm, adam in ADAM_RATE.items()
} | middle_rates()

Section = tuple[str, str, Sequence[Outcome], Write]


def sections(
    parts: Collection[str], folder: Path, *, seeds: int | None = None, hardly: bool = False
) -> Iterator[Path]:
    """Run what is left to run, and write the sections of the report, one after the other.

    Parameters
    ----------
    parts : collection of str
        Names of studies, `LIBRARIES`, `ENERGY`, `THEORY` and `DRIFT`.
    seeds : int, optional
        In each cell. Default: as many as each study has.
    hardly : bool
        Only some of it, with few steps, to see that it runs.
    """
    with marked(MARK if hardly else ""):
        yield from _written(parts, folder, seeds, hardly=hardly)


def _written(
    parts: Collection[str], folder: Path, seeds: int | None, *, hardly: bool
) -> Iterator[Path]:
    note = f" ({MARK})" if hardly else ""
    every = [*STUDIES, TUNING, KINDS, MNIST, INDIAN_PINES, IN_JAX, IN_TORCH]
    if hardly:
        every = [*map(brief, every)]
    *of_grids, in_jax, in_torch = every
    studies = [study for study in of_grids if study.name in parts]
    both = [in_jax, in_torch] if LIBRARIES in parts else []
    runs = folder / "runs"
    run([*studies, *both], runs, seeds=seeds)
    found = {study.name: results(study, runs, seeds=seeds) for study in (*studies, *both)}
    for study in studies:
        for title, name, outcomes, write in _sections(study, found[study.name].outcomes):
            yield write_comparisons(title + note, name, outcomes, folder, write)
    if both:
        table = torch_table(*(found[study.name].outcomes for study in both))
        yield write_section(IN_TORCH.title + note, LIBRARIES, [table], folder)
    if ENERGY in parts:
        yield write_section("What GC removes at the start" + note, ENERGY, energy_table(), folder)
    if THEORY in parts:
        yield from draw(folder, theory.BRIEF if hardly else theory.WHOLE)
    if DRIFT in parts:
        yield from drift.write_drift(folder, hardly=hardly)
    yield from draw_overview(folder)
    done = [study for study in every if is_done(study, runs, seeds=seeds)]
    if done:
        yield _write_machine({s.name: results(s, runs, seeds=seeds) for s in done}, folder)


def _sections(study: Study, outcomes: Sequence[Outcome]) -> Iterator[Section]:
    """Give title, name, outcomes and writer of each section on a study."""
    table2 = partial(as_table2, rates=MIDDLE_RATES)
    if study.name in {MNIST.name, INDIAN_PINES.name}:
        for number, is_of, write in ((1, _is_of_table1, as_table1), (2, _is_of_table2, table2)):
            chosen = [o for o in outcomes if o.arm != "update" and is_of(o)]
            yield f"{study.title}: Table {number}", f"{study.name}-table{number}", chosen, write
        return
    writers: dict[str, Write] = {
        "table1": as_table1,
        "table2": table2,
        "places": as_places,
        "rates": as_rates,
        "kinds": as_kinds,
        "tuning": as_tuning,
    }
    yield study.title, study.name, outcomes, writers.get(study.name, as_map)


def _is_of_table1(outcome: Outcome) -> bool:
    cell = outcome.cell
    rate = MIDDLE_RATES[cell.task, cell.network]["SGDM"]
    return cell.optimizer == "SGDM" and isclose(cell.learning_rate, rate)


def _is_of_table2(outcome: Outcome) -> bool:
    return isclose(outcome.cell.weight_decay, DECAY)


def _write_machine(found: Mapping[str, Results], folder: Path) -> Path:
    """Say where and how long it ran, apart from what came out, which is the same everywhere."""
    minutes = ", ".join(f"{name} {results.seconds / 60:.0f}" for name, results in found.items())
    machines = dict.fromkeys(name for results in found.values() for name in results.machines)
    path = folder / "machine.md"
    path.write_text(
        f"Trained on {'; '.join(machines)}. Minutes of one core: {minutes}.\n", encoding="utf-8"
    )
    return path
