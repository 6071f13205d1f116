"""The study on digits, from the runs to the report."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from benchmarks.paper.grids import ADAM_RATE, RATE, STUDIES, brief
from benchmarks.paper.report import Write, as_map, as_rates, as_table1, as_table2, write_section
from benchmarks.paper.study import results, run

__all__ = ["sections"]

WRITERS: dict[str, Write] = {
    "table1": as_table1,
    "table2": partial(as_table2, rates={"SGDM": RATE, "Adam": ADAM_RATE}),
    "rates": as_rates,
}


def sections(
    names: Collection[str], folder: Path, *, seeds: int | None = None, hardly: bool = False
) -> Iterator[Path]:
    """Run what is left of the studies, and write a section of each.

    Parameters
    ----------
    hardly : bool
        Only some of it, with few steps, to see that it runs.
    """
    studies = [brief(study) if hardly else study for study in STUDIES if study.name in names]
    runs = folder / "runs"
    run(studies, runs, seeds=seeds)
    for study in studies:
        outcomes = results(study, runs, seeds=seeds).outcomes
        yield write_section(
            study.title, study.name, outcomes, folder, WRITERS.get(study.name, as_map)
        )
