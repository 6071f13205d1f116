"""``python -m benchmarks demo``, in few steps; ``nox -s demo`` runs the whole of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from benchmarks import __main__
from benchmarks.demo import on_numpy, plot, problem, run, training
from benchmarks.demo.report import DemoReport, render, summarize
from benchmarks.demo.training import Framework, Run, Trace, find_frameworks, train_all

from libraries import installed

STEPS = 30
FOUND, LEFT_OUT = find_frameworks()


@pytest.fixture(scope="module")
def traces() -> dict[Run, Trace]:
    return train_all(FOUND, range(2), STEPS)


@pytest.fixture(scope="module")
def report(traces: dict[Run, Trace]) -> DemoReport:
    return summarize(traces, LEFT_OUT, "picture.png")


def test_every_framework_that_is_installed_takes_part() -> None:
    assert set(FOUND) == {name for name in ("numpy", "torch", "jax") if installed(name)}


class TestTraining:
    def test_every_framework_trains_its_networks(self, report: DemoReport) -> None:
        trained = {(row.framework, row.network) for row in report.rows}
        assert trained == {(n, network) for n, found in FOUND.items() for network in found.NETWORKS}

    def test_it_learns(self, traces: dict[Run, Trace]) -> None:
        for trace in traces.values():
            assert trace.losses[-1] < trace.losses[0]

    def test_frameworks_have_the_same_losses(self, report: DemoReport) -> None:
        assert report.ok, render(report)
        assert set(report.agreement.frameworks) == set(FOUND)
        assert report.agreement.steps == STEPS

    def test_centralization_keeps_the_mean_weights(self, report: DemoReport) -> None:
        rounding = {"float64": 1e-14, "float32": 1e-6}
        for row in report.rows:
            assert 0 < row.with_gc.drift < rounding[row.dtype]
            assert row.without_gc.drift > 1e-3

    def test_runs_start_from_the_same_weights(self) -> None:
        one, same, other = (problem.make("mlp", seed, STEPS) for seed in (0, 0, 1))
        assert (one.batches == same.batches).all()
        assert (one.batches != other.batches).any()
        assert (one.test.images == other.test.images).all()
        kernels = [task.weights["hidden"]["kernel"] for task in (one, same, other)]
        assert (kernels[0] == kernels[1]).all()
        assert (kernels[0] != kernels[2]).any()

    def test_images_for_testing_are_not_trained_on(self) -> None:
        task = problem.make("mlp", 0, STEPS)
        assert len(task.train.labels) + len(task.test.labels) == 1797
        trained = {image.tobytes() for image in task.train.images}
        assert not trained & {image.tobytes() for image in task.test.images}


class TestPlantedFaults:
    @pytest.mark.parametrize("name", FOUND)
    def test_optimizer_without_gc_disagrees(self, name: str) -> None:
        def trainer(task: Any, *, centralize: bool) -> Any:
            return FOUND[name].trainer(task, centralize=False)

        assert not self.compared_with_numpy(trainer, name).agreement.ok

    def test_other_momentum_disagrees(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def trainer(task: Any, *, centralize: bool) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(on_numpy, "MOMENTUM", on_numpy.MOMENTUM + 1e-8)
                return on_numpy.trainer(task, centralize=centralize)

        report = self.compared_with_numpy(trainer, "numpy")
        assert not report.ok
        assert "FAILED" in render(report)

    def test_same_optimizer_agrees(self) -> None:
        assert self.compared_with_numpy(on_numpy.trainer, "numpy").agreement.worst == 0

    def compared_with_numpy(self, trainer: Any, name: str) -> DemoReport:
        other = SimpleNamespace(NETWORKS=("mlp",), trainer=trainer)
        frameworks: dict[str, Framework] = {"reference": on_numpy, name: other}
        return summarize(train_all(frameworks, [0], STEPS), [], "")


class TestReport:
    def test_numbers_are_means_over_the_seeds(self) -> None:
        traces = {
            **self.of("numpy", True, [(0.5, 1e-16), (1.0, 3e-16)]),
            **self.of("numpy", False, [(0.25, 0.5), (0.25, 0.25)]),
        }
        report = summarize(traces, [], "")
        (row,) = report.rows
        assert (row.with_gc.accuracy, row.without_gc.accuracy) == (0.75, 0.25)
        assert (row.with_gc.accuracy_deviation, row.without_gc.accuracy_deviation) == (0.25, 0)
        assert (row.with_gc.drift, row.without_gc.drift) == (3e-16, 0.5)
        assert report.seeds == 2
        assert "75.00% +- 25.00%" in render(report)

    def test_one_framework_has_none_to_agree_with(self) -> None:
        both = {**self.of("numpy", True, [(1.0, 0.0)]), **self.of("numpy", False, [(1.0, 0.0)])}
        report = summarize(both, [], "")
        assert report.ok
        assert report.agreement.worst is None
        assert "only numpy ran" in render(report)

    @pytest.mark.parametrize("losses", [(1.0, nan), (1.0, 1.0 + 1e-9)])
    def test_losses_that_differ(self, losses: tuple[float, ...]) -> None:
        traces = {}
        for framework, of_framework in (("numpy", (1.0, 1.0)), ("torch", losses)):
            for centralize in (True, False):
                run = Run("mlp", framework, centralize, 0)
                traces[run] = Trace(of_framework, (0.0,), 1.0)
        report = summarize(traces, [], "")
        assert not report.ok
        assert "FAILED" in render(report)

    def of(
        self, framework: str, centralize: bool, results: Iterable[tuple[float, float]]
    ) -> dict[Run, Trace]:
        return {
            Run("mlp", framework, centralize, seed): Trace((1.0,), (drift,), accuracy)
            for seed, (accuracy, drift) in enumerate(results)
        }


class TestPlot:
    @pytest.mark.parametrize("ending", ["png", "svg"])
    def test_picture(self, ending: str, traces: dict[Run, Trace], tmp_path: Path) -> None:
        path = tmp_path / f"picture.{ending}"
        plot.save(traces, str(path))
        start = {"png": b"\x89PNG", "svg": b"<?xml"}[ending]
        assert path.read_bytes().startswith(start)

    def test_drift_of_zero_can_be_drawn(self, tmp_path: Path) -> None:
        traces = {
            Run("mlp", "numpy", centralize, 0): Trace((1.0, 0.5), (0.0, 1e-16), 1.0)
            for centralize in (True, False)
        }
        plot.save(traces, str(tmp_path / "picture.png"))


class TestCommand:
    def test_whole_command(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        few_steps = partial(run.run, steps=5)
        monkeypatch.setattr(run, "run", few_steps)
        path = str(tmp_path / "picture.png")
        assert __main__.main(["demo", "--json", "--seeds", "1", "--plot", path]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert Path(shown["plot"]).exists()
        assert (shown["seeds"], shown["steps"]) == (1, 5)
        assert shown == json.loads(json.dumps(asdict(few_steps(path, 1))))

    @pytest.mark.parametrize(
        ("path", "reason"),
        [("picture.doc", "must end in ."), ("nowhere/picture.png", "there is no folder")],
    )
    def test_picture_that_cannot_be_written_is_known_before_training(
        self,
        path: str,
        reason: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(run, "train_all", pytest.fail)
        assert __main__.main(["demo", "--plot", path]) == 2
        assert reason in capsys.readouterr().err

    def test_no_seeds_is_an_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            __main__.main(["demo", "--seeds", "0"])
        assert "must be at least 1" in capsys.readouterr().err


class TestFrameworks:
    def test_missing_framework_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(training, "find_spec", lambda name: name == "numpy" or None)
        found, left_out = find_frameworks()
        assert list(found) == ["numpy"]
        assert [(item.ok, item.what, item.why) for item in left_out] == [
            (True, "torch", 'torch not installed: pip install "gcx[torch]"'),
            (True, "jax", 'jax and optax not installed: pip install "gcx[jax]"'),
        ]

    def test_broken_framework_is_a_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(name: str) -> None:
            raise OSError("libtorch.so is missing")

        monkeypatch.setattr(training, "import_module", fail)
        monkeypatch.setattr(training, "find_spec", lambda name: name == "torch" or None)
        _, left_out = find_frameworks()
        (torch,) = (item for item in left_out if item.what == "torch")
        assert (torch.ok, torch.why) == (False, "OSError: libtorch.so is missing")
