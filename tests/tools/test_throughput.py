"""``python -m benchmarks throughput``: a run and the command; no time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.throughput import run, workload
from benchmarks.throughput.models import MODELS
from benchmarks.throughput.report import BenchReport, render
from benchmarks.throughput.timing import Call
from benchmarks.throughput.workload import COPY, EXPRESSION, GCX

from small_models import CHOICES, IN_BFLOAT16, LIBRARIES, SMALL, TRANSPOSED


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure small models, and briefly."""
    for name, model in (("resnet50", SMALL), ("vit-b16", SMALL), ("gpt2", TRANSPOSED)):
        monkeypatch.setitem(MODELS, name, model)
    monkeypatch.setattr(run, "_SECONDS", 0.0)


@pytest.mark.usefixtures("small")
class TestRun:
    def test_row_for_everything_that_is_here(self) -> None:
        report = run.run(command="bench", models=["resnet50", "gpt2"])
        assert report.ok, render(report)
        rows = {(row.model, row.dtype, row.library) for row in report.rows}
        titles = ("small", "transposed")
        assert rows == {(title, dtype, name) for title in titles for name, dtype in CHOICES}

    def test_numbers_of_a_row(self) -> None:
        (row,) = run.run(
            command="", models=["resnet50"], dtypes=["bfloat16"], libraries=IN_BFLOAT16[:1]
        ).rows
        assert row.weights == 2
        assert row.bytes == 2 * SMALL.elements * 2
        assert row.gigabytes_per_second == pytest.approx(1e-3 * row.bytes / row.microseconds)
        by_speeds = row.copy_gigabytes_per_second / row.gigabytes_per_second
        assert row.over_copy == pytest.approx(by_speeds)
        assert row.ratios[EXPRESSION] > 0
        assert (row.host_microseconds, row.launches) == (None, None)

    def test_host_and_launches_on_a_device_that_works_alone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = workload.Workload(
            {COPY: int, GCX: int, EXPRESSION: float},
            copied=100,
            clock=lambda call, _: 2.0 if call is float else 1.0,
            host_clock=lambda call, _: 3e-6,
            launches=lambda call: 4,
        )
        monkeypatch.setattr(workload.load(LIBRARIES[0]), "workload", lambda *_: made)
        (row,) = run.run(
            command="", models=["resnet50"], dtypes=["float32"], libraries=LIBRARIES[:1]
        ).rows
        assert (row.host_microseconds, row.launches) == (3.0, 4)
        assert row.copy_gigabytes_per_second == pytest.approx(1e-7)
        assert row.ratios == {EXPRESSION: 0.5}

    def test_ratios_are_below_1_where_gcx_is_faster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seconds: dict[Call, float] = {int: 1.0, float: 2.0, str: 8.0}
        made = workload.Workload(
            {COPY: int, GCX: float, EXPRESSION: str},
            copied=2 * SMALL.elements * 4,
            clock=lambda call, _: seconds[call],
        )
        monkeypatch.setattr(workload.load(LIBRARIES[0]), "workload", lambda *_: made)
        (row,) = run.run(
            command="", models=["resnet50"], dtypes=["float32"], libraries=LIBRARIES[:1]
        ).rows
        assert row.over_copy == 2.0
        assert row.ratios == {EXPRESSION: 0.25}

    def test_large_models_wait_for_a_gpu(self) -> None:
        report = run.run(command="", dtypes=["float32"], libraries=LIBRARIES[:1])
        assert [row.model for row in report.rows] == ["small", "small"]
        (item,) = report.left_out
        assert item.ok
        assert item.what == "gpt2, gpt2-xl, llama3-8b-slice on a CPU"
        assert "--models gpt2,gpt2-xl,llama3-8b-slice" in item.why

    def test_model_that_memory_cannot_hold_is_left_out(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        library = workload.load(LIBRARIES[0])
        monkeypatch.setattr(library, "free_bytes", lambda _: 8 * SMALL.elements * 4 - 1)
        report = run.run(
            command="", models=["resnet50"], dtypes=["float32"], libraries=LIBRARIES[:1]
        )
        assert report.ok
        assert report.rows == ()
        (item,) = report.left_out
        assert item.why.startswith("takes 0.0 GB, and half of what is free")

    def test_dtype_that_a_library_lacks_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.failing("workload", "bfloat16", monkeypatch).ok
        assert not self.failing("workload", "float32", monkeypatch).ok

    def test_library_that_fails_is_a_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise RuntimeError("no kernel")

        calls = {COPY: int, GCX: fail, EXPRESSION: int}
        made = workload.Workload(calls, 100)
        monkeypatch.setattr(workload.load(LIBRARIES[0]), "workload", lambda *_: made)
        report = run.run(
            command="", models=["resnet50"], dtypes=["bfloat16"], libraries=LIBRARIES[:1]
        )
        assert not report.ok
        assert "FAILED: RuntimeError: no kernel" in render(report)

    def failing(self, function: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> BenchReport:
        def fail(*_: object) -> None:
            raise TypeError("no such dtype")

        monkeypatch.setattr(workload.load(LIBRARIES[0]), function, fail)
        report = run.run(command="", models=["resnet50"], dtypes=[dtype], libraries=LIBRARIES[:1])
        assert [item.why for item in report.left_out] == ["TypeError: no such dtype"]
        return report


@pytest.mark.usefixtures("small")
class TestCommand:
    CHOSEN = ("--models", "resnet50", "--dtypes", "float32", "--libraries", LIBRARIES[0])

    def test_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["throughput", *self.CHOSEN]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"python -m benchmarks throughput {' '.join(self.CHOSEN)}, 20")
        assert "small  float32" in text

    def test_json_is_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["throughput", *self.CHOSEN, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["setting"]["gcx"]
        (row,) = shown["rows"]
        assert row["model"] == "small"
        assert row["over_copy"] > 0

    def test_json_is_written_beside_the_text(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "bench.json"
        assert main(["throughput", *self.CHOSEN, "--json", str(path)]) == 0
        assert "small  float32" in capsys.readouterr().out
        assert json.loads(path.read_text(encoding="utf-8"))["ok"]

    def test_chart(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("matplotlib")
        path = tmp_path / "bench.png"
        assert main(["throughput", *self.CHOSEN, "--plot", str(path)]) == 0
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"Plot: {path}" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["--models", "resnet"], "there is no 'resnet', but resnet50, vit-b16"),
            (["--dtypes", "float16"], "there is no 'float16', but float32, bfloat16"),
            (["--libraries", "numpy,mlx"], "there is no 'mlx', but numpy, torch, jax, cupy"),
            (["cpu"], "unrecognized arguments: cpu"),
        ],
    )
    def test_wrong_argument(
        self, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["throughput", *arguments])
        assert reason in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["--gpu", "--libraries", "numpy"], "none of these has a GPU here: numpy"),
            (["--json", "out.txt"], "--json out.txt: the name must end in .json"),
            (["--json", "nowhere/out.json"], "there is no folder nowhere"),
        ],
    )
    def test_what_cannot_be_done_is_said_before_anything_is_measured(
        self,
        arguments: list[str],
        reason: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(run, "interleaved", pytest.fail)
        assert main(["throughput", *arguments]) == 2
        assert reason in capsys.readouterr().err

    def test_chart_that_cannot_be_written(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("matplotlib")
        monkeypatch.setattr(run, "interleaved", pytest.fail)
        assert main(["throughput", "--plot", "chart.doc"]) == 2
        assert "must end in ." in capsys.readouterr().err
