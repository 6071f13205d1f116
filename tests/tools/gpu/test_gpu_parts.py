"""The parts of the GPU check run one after the other, and each error is a miss."""

from __future__ import annotations

import re
from functools import partial
from math import inf
from time import perf_counter
from typing import Any

import pytest

pytest.importorskip("torch")

from benchmarks.command.libraries import LeftOut
from benchmarks.gpu import acceptance, bits, graphs, launches, optimizers, programs, times
from benchmarks.gpu.acceptance import PARTS, Part, measure
from benchmarks.gpu.report import Measured, NotRunError

from gpu_standin import StandIn
from torch_kernels import Device


def gives_two(_: Any) -> Any:
    yield Measured("first", 1, 2)
    yield Measured("second", 3, 2)


def raises_after_one(_: Any) -> Any:
    yield Measured("first", 1, 2)
    raise RuntimeError("an illegal memory access\nand more")


def need_not_run(_: Any) -> Any:
    raise NotRunError("no such tool")


class TestParts:
    def test_every_part_is_a_function_and_no_function_is_forgotten(self) -> None:
        files = (bits, launches, times, graphs, optimizers, programs)
        made = {
            f"{file.__name__.rpartition('.')[2]}.{name}" for file in files for name in file.__all__
        }
        no_part = {
            *("bits.bits_of", "bits.count_differing", "bits.main", "programs.outputs"),
            *("optimizers.layouts_of", "optimizers.module_of"),
        }
        assert {part.place for part in PARTS} == {*made - no_part, "on_jax.times"}

    def test_error_is_a_miss_and_the_rest_goes_on(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows, left_out = self.measured(gpu, monkeypatch, raises_after_one, gives_two)
        assert [(row.what, row.ok) for row in rows] == [
            ("first", True),
            ("times.probe0", False),
            ("first", True),
            ("second", False),
        ]
        assert rows[1].why == "RuntimeError: an illegal memory access"
        assert left_out == ()

    def test_what_cannot_be_measured_is_left_out(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows, left_out = self.measured(gpu, monkeypatch, need_not_run)
        assert rows == ()
        assert left_out == (LeftOut(True, "name, times.probe0", "no such tool"),)

    def test_missing_package_is_named(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        part = Part("name", "times", "of_models", needs=("os", "no_such_package"))
        rows, (item,) = measure(gpu, [part])
        assert rows == ()
        assert (item.ok, item.why) == (True, "not installed: no_such_package")
        monkeypatch.setattr(acceptance, "find_spec", lambda _: None)
        rows, (item,) = measure(gpu, [Part("CuPy", "times", "of_cupy", needs=("cupy",))])
        assert rows == ()
        assert (item.ok, item.why) == (True, "not installed: cupy")

    @pytest.mark.parametrize("rows_in_time", [0, 1])
    def test_nothing_goes_on_when_the_time_is_up(
        self, rows_in_time: int, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def takes_long(gpu: StandIn) -> Any:
            gpu.until = 0.0
            yield Measured("first", 1, 2)
            pytest.fail("the time was up")

        gpu.until = inf if rows_in_time else 0.0
        rows, _ = self.measured(gpu, monkeypatch, takes_long)
        assert [row.what for row in rows] == [*["first"] * rows_in_time, "times.probe0"]
        assert (rows[-1].ok, rows[-1].why) == (False, "TimeoutError: the time was up")

    def test_programs_are_given_the_time_that_is_left(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gpu.until = perf_counter() + 10
        gpu.is_brief = False
        monkeypatch.setattr(programs, "which", lambda _: "compute-sanitizer")
        given: list[float] = []

        def outputs(commands: Any, *, seconds: float, **_: Any) -> list[str]:
            given.append(seconds)
            return ['{"launches": 0, "wrong": 0}'] * len(commands)

        monkeypatch.setattr(programs, "outputs", outputs)
        places = ("programs", "two_processes"), ("programs", "memcheck")
        measure(gpu, [Part("name", *place) for place in places])
        assert len(given) == 2
        assert all(0 < seconds <= 10 for seconds in given)

    def test_broken_gpu_does_not_end_the_report(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu, "release", partial(raises_after_one, None).__call__)
        rows, _ = self.measured(gpu, monkeypatch, gives_two)
        assert len(rows) == 2

    def test_kernels_that_fail_are_a_miss_in_every_part(
        self, gpu: StandIn, kernels: Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> Any:
            raise RuntimeError("no such image")

        monkeypatch.setattr(kernels.driver, "launch", fail)
        parts = [Part("name", "launches", "counted"), Part("name", "graphs", "replays")]
        first, second = measure(gpu, parts)[0]
        assert not first.ok
        assert re.search(r"CUDA kernels of gcx cannot run.*no such image", first.why)
        assert not second.ok
        assert second.why == "RuntimeError: the kernels are not used: RuntimeError: no such image"

    def measured(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch, *functions: Any) -> Any:
        for k, function in enumerate(functions):
            monkeypatch.setattr(times, f"probe{k}", function, raising=False)
        return measure(gpu, [Part("name", "times", f"probe{k}") for k in range(len(functions))])
