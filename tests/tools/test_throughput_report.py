"""The table and the chart of ``python -m benchmarks throughput``."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.command.libraries import LeftOut
from benchmarks.throughput import models, run, workload
from benchmarks.throughput.report import BenchReport, Row, render
from benchmarks.throughput.setting import setting
from benchmarks.throughput.workload import EXPRESSION

from small_models import LIBRARIES

ROW = Row(
    model="small",
    dtype="float32",
    library="torch",
    device="cuda:0",
    weights=2,
    bytes=1000,
    microseconds=2.5,
    gigabytes_per_second=0.4,
    copy_gigabytes_per_second=0.5,
    over_copy=1.25,
    ratios={EXPRESSION: 0.1234, "pytorch_optimizer": 0.15},
    host_microseconds=1.25,
    launches=1,
)


class TestReport:
    def test_cells(self) -> None:
        (line,) = (line for line in self.text(ROW).splitlines() if line.startswith("small"))
        assert re.split("  +", line) == [
            *("small", "float32", "torch", "cuda:0"),
            *("2.5 us", "0.4", "1.25", "0.12", "0.15 pytorch_optimizer", "1.2 us", "1"),
        ]

    def test_direction_of_the_ratios_is_told(self) -> None:
        text = self.text(ROW)
        (header,) = (line for line in text.splitlines() if line.startswith("model"))
        assert re.split("  +", header)[6:9] == ["over a copy", "expression", "peer"]
        told = "Over a copy, expression, peer: the time of gcx over theirs, below 1 gcx is faster."
        assert told in text

    def test_what_is_not_known_is_a_dash(self) -> None:
        row = replace(ROW, ratios={EXPRESSION: 2.0}, host_microseconds=None, launches=None)
        (line,) = (line for line in self.text(row).splitlines() if line.startswith("small"))
        assert line.split()[-3:] == ["-", "-", "-"]

    def test_long_times_are_in_milliseconds(self) -> None:
        assert "123.5 ms" in self.text(replace(ROW, microseconds=123_456.0))

    def test_devices_and_versions_are_named(self) -> None:
        assert "cuda:0: Some GPU" in self.text(ROW)
        assert "numpy " in self.text(ROW)

    def test_left_out(self) -> None:
        report = BenchReport(True, setting("", {}), (), (LeftOut(True, "jax", "it rains"),), None)
        assert "  jax  it rains" in render(report)

    def text(self, row: Row) -> str:
        found = setting("python -m benchmarks throughput", {"cuda:0": "Some GPU"})
        return render(BenchReport(True, found, (row,), (), None))


class TestPlot:
    def test_colors_and_legends(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        from benchmarks.throughput import plot

        rows = [
            replace(ROW, model=model, dtype=dtype, library=library, device=device)
            for model in ("one", "other")
            for dtype in models.DTYPES
            for library, device in (("torch", "cuda:0"), ("cupy", "cuda:0"), ("torch", "cpu"))
        ]
        figure = plot.drawn(rows)
        assert len(figure.axes) == 2 * 2 * 2  # CPU and GPU, dtypes, speed and ratio
        for panel in figure.axes:
            assert panel.get_xlabel()
            assert panel.get_ylabel() in (
                "GB/s read and written, more is faster",
                "time over others, below 1 gcx is faster",
            )
            assert panel.get_legend() is not None
            assert [label.get_text() for label in panel.get_xticklabels()] == ["one", "other"]

    def test_model_that_one_library_lacks(self) -> None:
        pytest.importorskip("matplotlib")
        from benchmarks.throughput import plot

        rows = [ROW, replace(ROW, model="other"), replace(ROW, library="jax", model="other")]
        speed, _ = plot.drawn(rows).axes
        legend = [text.get_text() for text in speed.get_legend().get_texts()]
        assert legend == ["torch, cuda:0", "jax, cuda:0", "speed of a copy, same library"]
        assert [len(bars) for bars in speed.containers] == [2, 1]

    def test_nothing_to_draw(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("matplotlib")
        monkeypatch.setattr(workload.load(LIBRARIES[0]), "free_bytes", lambda _: 0)
        path = tmp_path / "chart.png"
        report = run.run(command="", libraries=LIBRARIES[:1], plot=str(path))
        assert report.plot is None
        assert not path.exists()
