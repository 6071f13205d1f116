"""The picture of all studies: which comparisons are in it, and what it says."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper.cells import Cell
from benchmarks.paper.overview import at_tuned_rates, draw_overview
from benchmarks.paper.rows import write_comparisons
from benchmarks.paper.statistics import compare_all

from outcomes import arms

DIGITS = [
    Cell("digits, all images", network, "SGDM", rate, 5e-4)
    for network in ("batch norm", "group norm")
    for rate in (0.05, 0.1)
]
OTHERS = [
    Cell("MNIST, all images", "batch norm", "SGDM", 0.4, 5e-4),
    Cell("MNIST, all images", "transformer", "AdamW", 0.005, 0.01),
    Cell("diabetes", "perceptron", "SGDM", 0.01, 5e-4),
]
EFFECTS = [1.0, 1.0, -1.0, 0.0, 1.0, -1.0, 0.0]


def comparisons(cells, effects):
    made = [
        arms(cell, {"gradient": e, "update": e}) for cell, e in zip(cells, effects, strict=True)
    ]
    return compare_all([outcome for each in made for outcome in each])


def test_each_is_at_the_rate_that_is_best_without_gc():
    found = at_tuned_rates(comparisons(DIGITS, EFFECTS[:4]))
    assert [(c.cell.network, c.cell.learning_rate) for c in found] == [
        ("batch norm", 0.1),
        ("group norm", 0.05),
    ]
    assert {c.family for c in found} == {2}


def test_it_can_be_read_on_its_own(tmp_path: Path):
    assert [*draw_overview(tmp_path)] == []
    write_comparisons(comparisons(DIGITS, EFFECTS[:4]), tmp_path / "table2" / "comparisons.csv")
    assert [*draw_overview(tmp_path)] == []
    write_comparisons(comparisons(OTHERS, EFFECTS[4:]), tmp_path / "kinds" / "comparisons.csv")
    (path,) = draw_overview(tmp_path)
    text = path.read_text(encoding="utf-8")
    for words in (
        *("Digits, batch norm", "Digits, group norm", "MNIST, batch norm", "MNIST, transformer"),
        *("Diabetes, perceptron", "SGD, all", "AdamW", "SGD"),
        *("helps: 2", "no difference shown: 1", "hurts: 2"),
    ):
        assert f">{words}<" in text
    assert "correction for 5" in text
    assert len(text) < 60_000
