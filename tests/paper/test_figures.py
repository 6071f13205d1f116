"""Pictures of outcomes: what they say in words, and that they are the same bytes every time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.paper import figures
from benchmarks.paper.cells import Outcome
from benchmarks.paper.statistics import compare_all

from outcomes import TABLE_1, TABLE_2, arms

ROOT = Path(__file__).parents[2]
IN_A_NEW_PROCESS = """
import sys
from pathlib import Path
from benchmarks.paper import figures
from benchmarks.paper.statistics import compare_all
from outcomes import TABLE_2, arms
outcomes = [o for cell in TABLE_2[:2] for o in arms(cell, {"gradient": 1.0, "update": -1.0})]
folder = Path(sys.argv[1])
figures.curves(outcomes, folder / "curves.svg")
figures.forest(compare_all(outcomes), folder / "forest.svg")
"""


@pytest.fixture
def outcomes() -> list[Outcome]:
    return [o for cell in TABLE_2 for o in arms(cell, {"gradient": 1.0, "update": -1.0})]


def text_of(draw: Callable[[Path], None], folder: Path) -> str:
    """The SVG, in which words are words."""
    draw(folder / "words.svg")
    return (folder / "words.svg").read_text(encoding="utf-8")


class TestCurves:
    def test_it_can_be_read_on_its_own(self, outcomes: list[Outcome], tmp_path: Path) -> None:
        text = text_of(lambda path: figures.curves(outcomes, path), tmp_path)
        for words in (
            "digits, 20 a class, batch norm, weight decay 5e-4",
            *(">Adam, learning rate 0.0015<", ">training loss (nats)<", ">test accuracy (%)<"),
            *(">step<", ">without GC<", ">with GC on the gradient<", ">with GC on the update<"),
            "median over the seeds (10)",
        ):
            assert words in text
        assert text.count(">Adam, learning rate 0.001<") == 1

    def test_epochs(self, outcomes: list[Outcome], tmp_path: Path) -> None:
        text = text_of(lambda path: figures.curves(outcomes[:3], path, unit="epoch"), tmp_path)
        assert ">epoch<" in text
        assert ">step<" not in text

    def test_runs_that_diverged_leave_the_picture_whole(self, tmp_path: Path) -> None:
        base, other = arms(TABLE_1[0], {"gradient": 0.0})
        loss = other.loss.copy()
        loss[:6, 40:] = np.nan
        figures.curves([base, replace(other, loss=loss)], tmp_path / "curves.svg")
        assert "nan" not in (tmp_path / "curves.svg").read_text(encoding="utf-8").lower()


class TestForest:
    def test_it_can_be_read_on_its_own(self, outcomes: list[Outcome], tmp_path: Path) -> None:
        text = text_of(lambda path: figures.forest(compare_all(outcomes), path), tmp_path)
        for words in (
            "digits, 20 a class, batch norm, weight decay 5e-4",
            *(
                "with GC on the gradient or with GC on the update",
                "minus without GC",
                "difference (points), 95% interval",
            ),
            *("helps (6)", "no difference shown (0)", "hurts (6)"),
            *("learning rate 0.0015, GC on the gradient", "learning rate 0.0015, GC on the update"),
        ):
            assert words in text

    def test_a_verdict_has_its_color(self, tmp_path: Path) -> None:
        found = compare_all(
            [o for cell in TABLE_1[:3] for o in arms(cell, {"gradient": 1.0, "update": -1.0})]
        )
        text = text_of(lambda path: figures.forest(found, path), tmp_path)
        helps, hurts, not_shown = (
            text.count(f"stroke: {color}") for color in ("#0072b2", "#d55e00", "#696969")
        )
        assert helps == hurts > not_shown > 0  # that of no row is in the legend alone


class TestDeterminism:
    def test_the_same_bytes_from_another_process(
        self, outcomes: list[Outcome], tmp_path: Path
    ) -> None:
        some = outcomes[:6]
        figures.curves(some, tmp_path / "curves.svg")
        figures.forest(compare_all(some), tmp_path / "forest.svg")
        again = tmp_path / "again"
        again.mkdir()
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "paper")))
        subprocess.run(
            [sys.executable, "-c", IN_A_NEW_PROCESS, str(again)],
            env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7"},
            check=True,
        )
        for name in ("curves.svg", "forest.svg"):
            assert (tmp_path / name).read_bytes() == (again / name).read_bytes()
            assert b"<dc:date>" not in (again / name).read_bytes()

    def test_a_png(self, outcomes: list[Outcome], tmp_path: Path) -> None:
        for name in ("first.png", "second.png"):
            figures.curves(outcomes[:3], tmp_path / name)
        first = (tmp_path / "first.png").read_bytes()
        assert first.startswith(b"\x89PNG")
        assert first == (tmp_path / "second.png").read_bytes()
