"""``python -m benchmarks throughput``: its measurements and its report; no time is asserted."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.command.libraries import LeftOut
from benchmarks.throughput import models, run, timing, workload
from benchmarks.throughput.models import MODELS, Model, Weight, llama3, output_first
from benchmarks.throughput.report import BenchReport, Row, render
from benchmarks.throughput.setting import free_bytes_of_host, setting
from benchmarks.throughput.workload import COPY, EXPRESSION, GCX
from gcx import backends
from gcx.__main__ import look_up

from libraries import installed

SMALL = Model("small", (Weight((4, 3, 2, 2)), Weight((6, 5))), ((4,),))
TRANSPOSED = Model("transposed", (Weight((5, 6), "...o"), Weight((3, 4))), ())
LIBRARIES = [name for name in ("numpy", "torch", "jax") if installed(name)]
IN_BFLOAT16 = [name for name in LIBRARIES if name != "numpy" or find_spec("ml_dtypes")]
CHOICES = [
    *((name, "float32") for name in LIBRARIES),
    *((name, "bfloat16") for name in IN_BFLOAT16),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure small models, and briefly."""
    for name, model in (("resnet50", SMALL), ("vit-b16", SMALL), ("gpt2", TRANSPOSED)):
        monkeypatch.setitem(MODELS, name, model)
    monkeypatch.setattr(run, "_SECONDS", 0.0)


class TestModels:
    """Against the models of torchvision, timm and transformers, as their authors count them."""

    @pytest.mark.parametrize(
        ("model", "parameters", "tensors", "weights", "units"),
        [
            (MODELS["resnet50"], 25_557_032, 161, 54, 27_560),
            (MODELS["vit-b16"], 86_567_656, 152, 50, 84_712),
            (MODELS["gpt2"], 124_439_808, 148, 50, 134_225),
            (MODELS["gpt2-xl"], 1_557_611_200, 580, 194, 742_481),
            (llama3("whole", 32, has_embedding=True), 8_030_261_248, 291, 226, 1_632_768),
        ],
        ids=lambda value: value.title if isinstance(value, Model) else "",
    )
    def test_counts(
        self, model: Model, parameters: int, tensors: int, weights: int, units: int
    ) -> None:
        assert model.parameters == parameters
        assert len(model.weights) + len(model.others) == tensors
        assert len(model.weights) == weights
        assert sum(weight.units for weight in model.weights) == units

    @pytest.mark.parametrize(
        ("name", "fan_ins"),
        [
            ("resnet50", {64, 128, 147, 256, 512, 576, 1024, 1152, 2048, 2304, 4608}),
            ("vit-b16", {768, 3072}),
            ("gpt2", {768, 3072}),
            ("gpt2-xl", {1600, 6400}),
            ("llama3-8b-slice", {4096, 14336}),
        ],
    )
    def test_fan_ins(self, name: str, fan_ins: set[int]) -> None:
        assert {weight.fan_in for weight in MODELS[name].weights} == fan_ins
        assert {weight.fan_in for weight in output_first(MODELS[name]).weights} == fan_ins

    def test_slice_is_a_part_of_the_whole(self) -> None:
        whole, part = llama3("whole", 32, has_embedding=True), MODELS["llama3-8b-slice"]
        assert part.weights[:-1] == whole.weights[: 8 * 7]
        assert part.weights[-1] == whole.weights[-1]

    def test_output_first(self) -> None:
        assert output_first(TRANSPOSED).weights == (Weight((6, 5)), Weight((3, 4)))
        assert output_first(SMALL).weights == SMALL.weights


@pytest.mark.parametrize(("library", "dtype"), CHOICES)
@pytest.mark.parametrize("model", [SMALL, TRANSPOSED], ids=lambda model: model.title)
class TestWorkloads:
    def test_everybody_centralizes(self, library: str, model: Model, dtype: str) -> None:
        rounding = 5e-2 if dtype == "bfloat16" else 1e-6
        found = {
            name: [backends.load(library).to_numpy(grad) for grad in results]
            for name in self.made(library, model, dtype).calls
            if name != COPY
            for results in [self.made(library, model, dtype).calls[name]()]
        }
        assert {GCX, EXPRESSION} <= set(found)
        for results in found.values():
            for grad, expected, weight in zip(results, found[GCX], model.weights, strict=True):
                assert grad.shape == weight.shape
                assert grad.std() > 0.5
                np.testing.assert_allclose(grad.mean(weight.axes), 0, atol=rounding)
                np.testing.assert_allclose(grad, expected, atol=rounding)

    def test_copy_reads_and_writes_every_byte(self, library: str, model: Model, dtype: str) -> None:
        found = self.made(library, model, dtype)
        copied = found.calls[COPY]()
        assert found.copied == 2 * model.elements * models.DTYPES[dtype]
        if copied is not None:  # NumPy says nothing
            assert copied.nbytes * 2 == found.copied

    def test_peers_take_part_only_where_they_know_the_axes(
        self, library: str, model: Model, dtype: str
    ) -> None:
        peers = set(self.made(library, model, dtype).calls) - {COPY, GCX, EXPRESSION}
        of_library = {"jax": {"optax"}, "torch": {"pytorch_optimizer"}, "numpy": set()}[library]
        known = {peer for peer in of_library if find_spec(peer)}
        assert peers == (known if model is SMALL else set())

    def test_on_a_cpu_the_host_has_no_time_of_its_own(
        self, library: str, model: Model, dtype: str
    ) -> None:
        assert self.made(library, model, dtype).host_clock is None

    def made(self, library: str, model: Model, dtype: str) -> Any:
        return workload.load(library).workload(model.weights, dtype, cpu_of(library))


def cpu_of(library: str) -> str:
    return next(d for d in look_up(library).devices if "cpu" in d.lower())


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
        share = row.gigabytes_per_second / row.copy_gigabytes_per_second
        assert row.share_of_copy == pytest.approx(share)
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
    share_of_copy=0.8,
    ratios={EXPRESSION: 0.1234, "pytorch_optimizer": 0.15},
    host_microseconds=1.25,
    launches=1,
)


class TestReport:
    def test_cells(self) -> None:
        (line,) = (line for line in self.text(ROW).splitlines() if line.startswith("small"))
        assert re.split("  +", line) == [
            *("small", "float32", "torch", "cuda:0"),
            *("2.5 us", "0.4", "80%", "0.12", "0.15 pytorch_optimizer", "1.2 us", "1"),
        ]

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
            assert panel.get_ylabel() in ("GB/s, read and written", "below 1 gcx is faster")
            assert panel.get_legend() is not None
            assert [label.get_text() for label in panel.get_xticklabels()] == ["one", "other"]

    def test_model_that_one_library_lacks(self) -> None:
        pytest.importorskip("matplotlib")
        from benchmarks.throughput import plot

        rows = [ROW, replace(ROW, model="other"), replace(ROW, library="jax", model="other")]
        speed, _ = plot.drawn(rows).axes
        assert [len(bars) for bars in speed.containers] == [2, 1]

    def test_nothing_to_draw(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("matplotlib")
        monkeypatch.setattr(workload.load(LIBRARIES[0]), "free_bytes", lambda _: 0)
        path = tmp_path / "chart.png"
        report = run.run(command="", libraries=LIBRARIES[:1], plot=str(path))
        assert report.plot is None
        assert not path.exists()


class TestMemory:
    def test_of_this_machine(self) -> None:
        assert 0 < free_bytes_of_host() < 1 << 50

    def test_of_a_machine_that_does_not_say(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("benchmarks.throughput.setting._MEMINFO", tmp_path / "none")
        assert free_bytes_of_host() == 8 * 2**30


class TestTiming:
    def test_candidates_take_turns(self) -> None:
        called: list[str] = []
        times = timing.interleaved(
            {"a": lambda: called.append("a"), "b": lambda: called.append("b")},
            seconds=0,
            repeats=2,
            rounds=3,
        )
        assert set(times) == {"a", "b"}
        assert "".join(called) == "ab" + "aabb" + "bbaa" + "aabb"

    def test_median_of_what_the_clock_says(self) -> None:
        said = iter([5.0, 1.0, 2.0])
        times = timing.interleaved({"a": int}, seconds=0, rounds=3, clock=lambda *_: next(said))
        assert times == {"a": 2.0}

    def test_clock_of_a_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        happened: list[str] = []

        class Event:
            def record(self) -> None:
                happened.append("record")

            def synchronize(self) -> None:
                happened.append("synchronize")

        clock = timing.DeviceClock(
            flush=lambda: happened.append("flush"), event=Event, milliseconds=lambda *_: 4.0
        )
        now = iter([10.0, 10.009, 20.0, 20.001])  # the host takes 9 ms, then 1 ms
        monkeypatch.setattr(timing, "perf_counter", lambda: next(now))
        assert clock(lambda: happened.append("call"), 1) == 0.004
        time_of_a_flush = ["flush", "record", "flush", "record", "synchronize"]
        timed = ["record", "call", "record", "synchronize"]
        assert happened == ["call", *time_of_a_flush, *6 * ["flush"], *timed]
        happened.clear()
        clock(lambda: happened.append("call"), 1)
        assert happened == ["call", *2 * ["flush"], *timed]

    def test_host_clock_does_not_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = iter([10.0, 11.0])
        monkeypatch.setattr(timing, "perf_counter", lambda: next(now))
        waited: list[object] = []
        assert timing.host_clock(waited.append)(lambda: "result", 1) == 1.0
        assert waited == ["result"]

    def test_waiting_clock_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        waited: list[object] = []
        assert timing.waiting_clock(waited.append)(lambda: "result", 2) >= 0
        assert waited == ["result", "result"]


class Event(SimpleNamespace):
    """An event of torch's profiler."""

    def __init__(
        self, name: str, device: str, start: float, end: float, *, named: bool = False
    ) -> None:
        time_range = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        kind = SimpleNamespace(name=device)
        super().__init__(
            name=name, device_type=kind, time_range=time_range, is_user_annotation=named
        )


class TestProfile:
    CALL = (
        Event("call under test", "CPU", 10, 20, named=True),
        Event("call under test", "CUDA", 12, 30, named=True),
    )

    def test_kernels_and_copies(self) -> None:
        events = (
            *self.CALL,
            Event("Memcpy HtoD (Pinned -> Device)", "CUDA", 11, 12),
            Event("multi_tensor", "CUDA", 12, 15),
            Event("multi_tensor", "CUDA", 15, 16),
            Event("Optimizer.step#AdamW.step", "CPU", 10, 11, named=True),
            Event("Optimizer.step#AdamW.step", "CUDA", 12, 16, named=True),
            Event("cudaLaunchKernel", "CPU", 11, 12),
        )
        cuda = pytest.importorskip("benchmarks.throughput.cuda")
        found = cuda.summarized(events)
        assert found == cuda.Profile(kernels=2, copies=1, waits=0, seconds=pytest.approx(4e-6))

    def test_only_waits_of_the_call_count(self) -> None:
        cuda = pytest.importorskip("benchmarks.throughput.cuda")
        after = Event("cudaDeviceSynchronize", "CPU", 20, 25)
        assert cuda.summarized((*self.CALL, after)).waits == 0
        during = Event("cudaStreamSynchronize", "CPU", 15, 16)
        assert cuda.summarized((*self.CALL, after, during)).waits == 1
