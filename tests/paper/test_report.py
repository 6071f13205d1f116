"""Sections of the report, on outcomes that are made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks.paper.cells import Cell, Outcome
from benchmarks.paper.report import (
    Write,
    as_map,
    as_places,
    as_rates,
    as_table1,
    as_table2,
    write_comparisons,
)

from outcomes import TABLE_1, TABLE_2, arms

NETWORKS = ("batch norm", "group norm")


def gradient(cells: Sequence[Cell]) -> list[Outcome]:
    return [outcome for cell in cells for outcome in arms(cell, {"gradient": 1.0})]


def section(outcomes: Sequence[Outcome], write: Write, folder: Path) -> str:
    path = write_comparisons("Title", "name", outcomes, folder, write)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("write", "cells"), [(as_table1, TABLE_1[:2]), (as_table2, TABLE_2[2:4])])
def test_a_table_and_curves_for_each_network(
    write: Write, cells: Sequence[Cell], tmp_path: Path
) -> None:
    outcomes = [
        replace(o, cell=replace(o.cell, network=n)) for n in NETWORKS for o in gradient(cells)
    ]
    text = section(outcomes, write, tmp_path)
    assert text.startswith("## Title\n\n![")
    for network in NETWORKS:
        assert f"### Digits, 20 a class, {network}\n" in text
    assert [path.name for path in tmp_path.glob("*.svg")] == ["name.svg"]
    text = section(outcomes, partial(write, unit="epoch"), tmp_path)
    names = {path.name for path in tmp_path.glob("*.svg")}
    assert names == {
        "name.svg",
        *(f"name-digits-20-a-class-{n.replace(' ', '-')}.svg" for n in NETWORKS),
    }
    assert all(f"({name})" in text for name in names)
    assert len((tmp_path / "name" / "runs.csv").read_text().splitlines()) == 1 + 10 * len(outcomes)


def test_a_map_is_the_same_each_time(tmp_path: Path) -> None:
    texts = [section(gradient(TABLE_2), as_map, tmp_path / again) for again in "ab"]
    assert texts[0] == texts[1]
    for file in ("name.md", "name.svg", "name/runs.csv", "name/comparisons.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_update_is_compared_with_the_gradient_where_both_are(tmp_path: Path) -> None:
    both = arms(TABLE_2[0], {"gradient": 1.0, "update": 4.0})
    one = arms(TABLE_2[1], {"gradient": 1.0, "conv only": 1.0})
    text = section([*both, *one], as_places, tmp_path)
    against = text[text.index("### The update against the gradient") :]
    rows = [line for line in against.splitlines() if line.startswith("| update ")]
    assert len(rows) == 1
    assert "+3." in rows[0] or "+2.9" in rows[0]
    assert "accuracy with GC on the gradient" in against
    assert "conv only" not in against


def test_each_arm_at_the_rate_that_is_best_for_it(tmp_path: Path) -> None:
    low, high = TABLE_2[0], TABLE_2[1]  # SGDM at 0.05 and 0.1
    worse, better = arms(low, {"gradient": 0.0}), arms(high, {"gradient": -3.0})
    better[0] = replace(better[0], accuracy=better[0].accuracy + 2)
    text = section([*worse, *better], as_rates, tmp_path)
    (row,) = [line for line in text.splitlines() if line.startswith("| batch norm | SGDM ")]
    assert row.startswith("| batch norm | SGDM | 0.1, 0.05 | ")
    assert row.endswith(" hurts |")


def test_one_family_in_the_tables_the_figure_and_the_csv(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weak = rng.normal(0.6, 1, 10)  # p of 0.03 or so, which does not stand beside nine others
    cells = [replace(cell, network=name) for name in NETWORKS for cell in TABLE_1]
    outcomes = [outcome for cell in cells for outcome in arms(cell, {"gradient": 0.0})]
    outcomes[1] = replace(outcomes[1], accuracy=outcomes[0].accuracy + weak[:, None])
    text = section(outcomes, as_table1, tmp_path)
    lines = text.splitlines()
    p_t, p_holm = (
        float(next(line for line in lines if line.startswith(f"| {row} |")).split("|")[2])
        for row in ("p (t)", "p (t, Holm)")
    )
    assert p_t < 0.05
    assert p_holm == pytest.approx(10 * p_t, abs=0.01)
    assert "0 of these verdicts stand after Holm's correction for all 10 that were made" in text
    csv = (tmp_path / "name" / "comparisons.csv").read_text(encoding="utf-8")
    assert ",helps,no," in csv
    assert ",helps,yes," not in csv
