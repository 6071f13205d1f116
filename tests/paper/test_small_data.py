"""All sections of the report on small data, of outcomes that are made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.paper import small_data, store, study
from benchmarks.paper.cells import Outcome
from benchmarks.paper.command import PARTS
from benchmarks.paper.grids import STUDIES, brief
from benchmarks.paper.other_grids import INDIAN_PINES, KINDS, MNIST, TUNING
from benchmarks.paper.training import Grid

TABLES = [
    *("table1", "table2", "regimes", "places", "rates", "tuning", "kinds"),
    *(
        "mnist-table1",
        "mnist-table2",
        "indian-pines-table1",
        "indian-pines-table2",
        "libraries",
        "energy",
    ),
]


def made_up(grid: Grid, seeds: tuple[int, ...]) -> list[Outcome]:
    rng = np.random.default_rng(0)
    steps = grid.task.steps
    return [
        Outcome(
            cell=grid.cell(index),
            arm=arm,
            seeds=seeds,
            accuracy=rng.normal(90, 2, (len(seeds), len(grid.checkpoints))),
            loss=np.exp(-np.arange(steps) / 30 + rng.normal(0, 0.1, (len(seeds), steps))),
            checkpoints=grid.checkpoints,
        )
        for index in range(len(grid.cells))
        for arm in grid.arms
    ]


def make_up(studies: list[study.Study], folder: Path, *, seeds: int | None) -> None:
    for each in studies:
        for program in study._programs(each, seeds):
            found = [outcome for grid in program.grids for outcome in made_up(grid, program.seeds)]
            store.save(program.path(folder), found, seconds=60.0, machine="a machine")


@pytest.mark.parametrize(
    "whole", [*STUDIES, TUNING, KINDS, MNIST, INDIAN_PINES], ids=lambda s: s.name
)
def test_a_short_run_has_each_network_once(whole: study.Study) -> None:
    (grids,) = brief(whole).programs
    assert {grid.network.name for grid in grids} == {
        grids[0].network.name for grids in whole.programs
    }


def test_every_section_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(small_data, "run", make_up)
    monkeypatch.setattr(small_data, "energy_table", lambda: ["a table"])
    monkeypatch.setattr(small_data, "draw", lambda folder, along: drawn.append(along) or [])
    monkeypatch.setattr(small_data.drift, "write_drift", lambda folder, hardly: [])
    paths = list(small_data.sections(PARTS, tmp_path, hardly=True))
    names = [*(f"{name}.md" for name in TABLES), "overview.svg", "machine.md"]
    assert [path.name for path in paths] == names
    assert all(path.read_text().strip() for path in paths)
    pictures = [*tmp_path.glob("*.svg")]
    assert len(pictures) == 11
    assert all("a short run" in path.read_text() for path in (*paths[:13], *pictures))
    assert len(drawn) == 1
    assert "a machine" in paths[-1].read_text()
