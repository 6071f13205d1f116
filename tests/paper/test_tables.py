"""Tables of outcomes: what stands in which column, and that it is the same text every time."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.paper import rows as csv_rows
from benchmarks.paper import tables
from benchmarks.paper.cells import Cell, Outcome
from benchmarks.paper.labels import grouped
from benchmarks.paper.statistics import compare_all, holm

from outcomes import STEPS, TABLE_1, TABLE_2, arms

EFFECTS = {0.0: 1.0, 1e-4: 0.0, 2e-4: -1.0, 5e-4: 1.0, 1e-3: 1.0}


@pytest.fixture
def table_1() -> list[Outcome]:
    return [o for cell in TABLE_1 for o in arms(cell, {"gradient": EFFECTS[cell.weight_decay]})]


@pytest.fixture
def table_2() -> list[Outcome]:
    return [o for cell in TABLE_2 for o in arms(cell, {"gradient": 1.0})]


def rows_of(text: str) -> dict[str, list[str]]:
    """Cells of a Markdown table, by what stands first in their row."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in lines}


class TestTable1:
    def test_layout_of_the_supplement(self, table_1: list[Outcome]) -> None:
        rows = rows_of(tables.table1(compare_all(table_1)))
        assert rows["weight decay"] == ["0", "1e-4", "2e-4", "5e-4", "1e-3"]
        assert list(rows)[1:] == [
            *("paper, w/o GC", "paper, w/ GC", "ours, w/o GC", "ours, w/ GC"),
            *("difference [95% interval]", "p (t)", "p (sign flips)", "p (t, Holm)", "verdict"),
        ]

    def test_planted_effects_are_found(self, table_1: list[Outcome]) -> None:
        text = tables.table1(compare_all(table_1))
        none = "no difference shown"
        assert rows_of(text)["verdict"] == ["helps", none, "hurts", "helps", "helps"]
        assert "helps 3, no difference shown 1, hurts 1; 4 of these verdicts stand" in text

    def test_figures_are_those_of_the_comparison(self, table_1: list[Outcome]) -> None:
        rows = rows_of(tables.table1(compare_all(table_1)))
        found = compare_all(table_1)
        for column, c in enumerate(found):
            assert rows["ours, w/o GC"][column] == f"{c.base.mean:.2f} ± {c.base.sd:.2f}"
            assert rows["ours, w/ GC"][column] == f"{c.other.mean:.2f} ± {c.other.sd:.2f}"
            difference = rows["difference [95% interval]"][column]
            assert float(difference.split()[0]) == pytest.approx(c.paired.difference, abs=0.0051)

    def test_the_order_given_is_of_no_account(self, table_1: list[Outcome]) -> None:
        assert tables.table1(compare_all(table_1[::-1])) == tables.table1(compare_all(table_1))

    def test_a_column_that_was_not_run(self, table_1: list[Outcome]) -> None:
        rows = rows_of(tables.table1(compare_all(table_1[:4])))
        assert rows["verdict"] == ["helps", "no difference shown", "-", "-", "-"]

    def test_the_papers_figures_stand_beside_ours_bold_as_printed(
        self, table_1: list[Outcome], table_2: list[Outcome]
    ) -> None:
        rows = rows_of(tables.table1(compare_all(table_1)))
        assert rows["paper, w/o GC"][3] == "78.23 ± 0.42"
        assert rows["paper, w/ GC"][3] == "**79.14 ± 0.33**"
        rows = rows_of(tables.table2(compare_all(table_2)))
        assert rows["paper, w/o GC"][4:] == ["71.64 ± 0.56", "**70.63 ± 0.44**"]  # bold, and lower
        assert all(figures.startswith("**") for figures in rows["paper, w/ GC"])

    def test_another_arm(self, table_1: list[Outcome]) -> None:
        outcomes = [*table_1[:2], replace(table_1[5], cell=table_1[0].cell, arm="update")]
        assert rows_of(tables.table1(compare_all(outcomes), arm="update"))["verdict"][0] == "hurts"

    def test_a_cell_of_no_column(self, table_1: list[Outcome]) -> None:
        outcomes = arms(replace(TABLE_1[0], weight_decay=0.3), {"gradient": 1.0})
        with pytest.raises(ValueError, match=r"weight_decay=0\.3.* is in no column"):
            tables.table1(compare_all([*table_1, *outcomes]))

    def test_two_networks_in_one_table(self, table_1: list[Outcome]) -> None:
        outcomes = arms(replace(TABLE_1[0], network="group norm"), {"gradient": 1.0})
        with pytest.raises(ValueError, match="network"):
            tables.table1(compare_all([*table_1, *outcomes]))

    def test_an_arm_that_is_not_there(self, table_1: list[Outcome]) -> None:
        with pytest.raises(ValueError, match="no outcome of the arm 'conv only'"):
            tables.table1(compare_all(table_1), arm="conv only")


class TestTable2:
    def test_layout_of_the_supplement(self, table_2: list[Outcome]) -> None:
        rows = rows_of(tables.table2(compare_all(table_2)))
        assert rows["optimizer, learning rate"] == [
            *("SGDM 0.05", "SGDM 0.1", "SGDM 0.2", "Adam 0.0005", "Adam 0.001", "Adam 0.0015"),
        ]
        assert rows["verdict"] == ["helps"] * 6

    def test_learning_rates_in_the_papers_ratios(self, table_2: list[Outcome]) -> None:
        here = [
            replace(o, cell=replace(o.cell, learning_rate=o.cell.learning_rate * 0.3))
            for o in table_2
        ]
        rows = rows_of(tables.table2(compare_all(here), rates={"SGDM": 0.03, "Adam": 0.0003}))
        assert rows["optimizer, learning rate"][0] == "SGDM 0.05 (here 0.015)"
        assert rows["verdict"] == ["helps"] * 6
        with pytest.raises(ValueError, match="in no column"):
            tables.table2(compare_all(here))


class TestGrouped:
    def test_a_table_for_each_task_and_network(self, table_1: list[Outcome]) -> None:
        other = [replace(o, cell=replace(o.cell, network="group norm")) for o in table_1]
        mixed = [o for pair in zip(table_1, other, strict=True) for o in pair]
        groups = grouped(mixed, "task", "network")
        assert list(groups) == ["digits, 20 a class, batch norm", "digits, 20 a class, group norm"]
        assert tables.table1(
            compare_all(groups["digits, 20 a class, batch norm"])
        ) == tables.table1(compare_all(table_1))


class TestComparisons:
    def test_a_row_for_each_arm_of_each_cell(self) -> None:
        outcomes = [
            o for cell in TABLE_2[2:4] for o in arms(cell, {"gradient": 1.0, "conv only": 0.0})
        ]
        header, _, *rows = [
            line.strip("| ").split(" | ")
            for line in tables.comparisons(compare_all(outcomes)).splitlines()
            if line.startswith("|")
        ]
        assert header[:4] == ["optimizer", "learning rate", "GC on", "pairs"]  # no more differ
        assert [row[:3] for row in rows] == [
            ["SGDM", "0.2", "gradient"],
            ["SGDM", "0.2", "gradient, convolutions alone"],
            ["Adam", "0.0005", "gradient"],
            ["Adam", "0.0005", "gradient, convolutions alone"],
        ]
        assert [row[-1] for row in rows] == ["helps", "no difference shown"] * 2
        assert all(row[-2] == "1.00 (p 1.000)" for row in rows)  # the losses are the same

    def test_what_is_alike_is_said_once(self) -> None:
        text = tables.comparisons(compare_all(arms(TABLE_1[3], {"gradient": 1.0})))
        assert "digits, 20 a class, batch norm, SGDM, learning rate 0.1, weight decay 5e-4" in text

    def test_nothing_alike(self) -> None:
        other = Cell("CIFAR-100", "ResNet-50", "Adam", 0.001, 0.0)
        cells = (TABLE_1[3], other)
        text = tables.comparisons(
            compare_all([o for cell in cells for o in arms(cell, {"gradient": 1.0})])
        )
        assert text.startswith("Test accuracy in percent, mean ± sd.\n")

    def test_nothing_to_compare(self) -> None:
        with pytest.raises(ValueError, match="nothing to compare"):
            tables.comparisons(compare_all(arms(TABLE_1[0], {})))


def test_the_best_rate_is_printed_in_bold() -> None:
    outcomes = [arms(cell, {})[0] for cell in TABLE_2[:3]]
    outcomes[1] = replace(outcomes[1], accuracy=outcomes[1].accuracy + 1)
    text = tables.tuning(outcomes)
    (row,) = [line for line in text.splitlines() if line.startswith("| digits")]
    assert row.count("**") == 2
    assert ", **0.1: " in row
    assert "over seeds 0 to 9" in text


class TestCsv:
    def read(self, path: Path) -> list[dict[str, Any]]:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def test_a_row_for_each_run(self, table_1: list[Outcome], tmp_path: Path) -> None:
        csv_rows.write_runs(table_1, tmp_path / "new" / "runs.csv")
        rows = self.read(tmp_path / "new" / "runs.csv")
        assert len(rows) == sum(len(o.seeds) for o in table_1)
        expected = table_1[1]
        for seed in expected.seeds:
            row = rows[len(expected.seeds) + seed]
            assert (row["arm"], row["seed"], row["weight_decay"]) == ("gradient", str(seed), "0.0")
            assert float(row["accuracy"]) == pytest.approx(
                expected.accuracy[seed, -1], abs=0.5e-4 + 1e-9
            )
            assert 1 <= float(row["steps_to_loss"]) <= STEPS

    def test_a_run_that_never_gets_to_the_loss(
        self, table_1: list[Outcome], tmp_path: Path
    ) -> None:
        high = np.full_like(table_1[1].loss, 50.0)
        outcomes = [table_1[0], replace(table_1[1], loss=high)]
        csv_rows.write_runs(outcomes, tmp_path / "runs.csv")
        csv_rows.write_comparisons(compare_all(outcomes), tmp_path / "comparisons.csv")
        steps = [row["steps_to_loss"] for row in self.read(tmp_path / "runs.csv")]
        assert steps[10:] == ["inf"] * 10
        assert self.read(tmp_path / "comparisons.csv")[0]["steps_ratio"] == "inf"

    def test_a_row_for_each_comparison(self, table_1: list[Outcome], tmp_path: Path) -> None:
        found = compare_all(table_1)
        csv_rows.write_comparisons(found, tmp_path / "comparisons.csv")
        rows = self.read(tmp_path / "comparisons.csv")
        assert [row["verdict"] for row in rows] == [str(c.verdict) for c in found]
        assert [row["stands_after_holm"] for row in rows] == ["yes", "no", "yes", "yes", "yes"]
        adjusted = holm([c.paired.p for c in found])
        assert [float(row["p_holm"]) for row in rows] == pytest.approx(adjusted, rel=1e-5)
        assert [float(row["low"]) for row in rows] == pytest.approx(
            [c.paired.low for c in found], abs=1e-4
        )

    def test_comparisons_can_be_read_again(self, table_1: list[Outcome], tmp_path: Path) -> None:
        found = compare_all(table_1)
        csv_rows.write_comparisons(found, tmp_path / "comparisons.csv")
        again = csv_rows.read_comparisons(tmp_path / "comparisons.csv")
        assert tables.table1(again).splitlines()[:5] == tables.table1(found).splitlines()[:5]
        assert [(c.cell, c.arm, c.verdict, c.stands, c.family) for c in again] == [
            (c.cell, c.arm, c.verdict, c.stands, c.family) for c in found
        ]

    def test_the_same_outcomes_give_the_same_bytes(
        self, table_1: list[Outcome], tmp_path: Path
    ) -> None:
        for name in ("first", "second"):
            csv_rows.write_runs(table_1, tmp_path / name / "runs.csv")
            csv_rows.write_comparisons(compare_all(table_1), tmp_path / name / "comparisons.csv")
        for file in ("runs.csv", "comparisons.csv"):
            first, second = ((tmp_path / n / file).read_bytes() for n in ("first", "second"))
            assert first == second
            assert b"\r" not in first
