"""``python -m benchmarks gpu`` on a CPU that emulates the kernels.

It cannot tell the numbers. Here each row is seen to measure its subject, and to find a fault.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from functools import partial
from math import inf, nan
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import gcx
import gcx.torch
from benchmarks.__main__ import main
from benchmarks.agreement.formats import FORMATS
from benchmarks.command import reports
from benchmarks.command.libraries import LeftOut
from benchmarks.gpu import (
    acceptance,
    bits,
    cases,
    device,
    graphs,
    launches,
    optimizers,
    programs,
    stress,
    times,
)
from benchmarks.gpu.acceptance import PARTS, Part, measure
from benchmarks.gpu.report import GpuReport, Measured, NotRunError, Row, judged, render
from benchmarks.throughput import cuda
from benchmarks.throughput.models import DTYPES, MODELS, Model, Weight
from benchmarks.throughput.setting import setting
from gcx.backends import _torch
from gcx.torch import _fused

import reference
from gpu_standin import StandIn
from libraries import installed
from torch_kernels import EMULATED, Device

PEER = "pytorch_optimizer.optimizer.gradient_centralization"
SMALL = Model("small", (Weight((4, 3, 2, 2)), Weight((6, 5))), ((4,),))
COLUMNS = Model("columns", (Weight((5, 6), "...o"), Weight((3, 4))), ())
ADAMW = {"lr": 2**-10, "betas": (0.875, 0.96875), "eps": 2**-27, "weight_decay": 2**-6}
FORMAT = {kind.name: kind for kind in FORMATS}
ALL_MODELS = optimizers._MODELS


@pytest.fixture
def gpu() -> StandIn:
    return StandIn()


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(_torch, "is_for_kernels", lambda _: True)
    return Device(EMULATED, monkeypatch)


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take small models and few steps."""
    for name in MODELS:
        monkeypatch.setitem(MODELS, name, COLUMNS if name == "gpt2" else SMALL)
    monkeypatch.setattr(times, "_MODELS", (SMALL, COLUMNS))
    monkeypatch.setattr(graphs, "_STEPS", 3)
    monkeypatch.setattr(graphs, "_WEIGHTS", (*SMALL.weights, *COLUMNS.weights))
    monkeypatch.setattr(optimizers, "_MODELS", (SMALL,))
    monkeypatch.setattr(bits, "FAN_INS", (9, 144))


def not_centralized(grads: Any, /, *, out: Any = None, **_: Any) -> Any:
    return grads if out is None else out


class TestVerdict:
    @pytest.mark.parametrize(
        ("value", "limit", "at_least", "ok"),
        [
            (1.0, 1.0, False, True),
            (1.1, 1.0, False, False),
            (8.0, 8.0, True, True),
            (7.9, 8.0, True, False),
            (nan, 1.0, False, False),
            (-inf, 1.0, False, False),
            (inf, 8.0, True, False),
            (1.0, None, False, True),
            (nan, None, False, False),
        ],
    )
    def test_of_a_number(self, value: float, limit: Any, at_least: bool, ok: bool) -> None:
        measured = Measured("what", value, limit, "us", at_least)
        row = judged("part", measured)
        assert row.ok is ok
        assert json.loads(json.dumps(row.measured), parse_constant=pytest.fail) in (value, None)


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

    def test_missing_package_is_named(self, gpu: StandIn) -> None:
        part = Part("name", "times", "of_models", needs=("os", "no_such_package"))
        rows, (item,) = measure(gpu, [part])
        assert rows == ()
        assert (item.ok, item.why) == (True, "not installed: no_such_package")

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


class TestBits:
    def test_canonical_order_has_the_bits(self, gpu: StandIn, kernels: Device) -> None:
        seen: dict[str, list[bool]] = {"16 bytes at a time": [], "elementwise": []}
        count = 0
        for row in bits.of_torch(gpu):
            assert row.ok, row
            (access,) = (access for access in seen if access in row.what)
            for launch in kernels.driver.launches[count:]:
                seen[access].append(access == "elementwise" or not launch.elementwise)
                assert bool(launch.packed) is (access != "elementwise"), row
            count = len(kernels.driver.launches)
        assert all(seen["16 bytes at a time"])
        assert min(map(len, seen.values())) >= 4 * 3 * 2  # dtypes, ways, rows and columns

    @pytest.mark.parametrize("code", [0, 1])
    def test_few_of_them_for_slow_inspectors(
        self, code: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["bits", "cpu"])
        monkeypatch.setattr(bits, "_FEW", (9, 144))
        if code:
            monkeypatch.setattr(bits, "gcx", SimpleNamespace(centralize_many=not_centralized))
        assert bits.main() == code

    def test_wrong_bits_are_counted(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        def one_bit_off(grads: Any, **options: Any) -> Any:
            first, *rest = gcx.centralize_many(grads, **options)
            changed = first.clone()
            changed.view(-1)[0] = torch.nextafter(changed.view(-1)[0], torch.tensor(9.0).to(first))
            return [changed, *rest]

        monkeypatch.setattr(bits, "gcx", SimpleNamespace(centralize_many=one_bit_off))
        assert {row.value for row in bits.of_torch(gpu)} == {1}

    def test_what_is_not_written_is_found(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bits, "gcx", SimpleNamespace(centralize_many=not_centralized))
        assert not any(row.ok for row in bits.of_torch(gpu))

    @pytest.mark.parametrize(
        ("found", "expected", "count"),
        [
            ([0.0, 1.0], [0.0, 1.0], 0),
            ([0.0, 1.0], [-0.0, 1.0], 1),
            ([nan, 1.0], [nan, 2.0], 1),
            ([nan, inf], [1.0, -inf], 2),
        ],
    )
    def test_count_differing(self, found: list[float], expected: list[float], count: int) -> None:
        assert bits.count_differing(np.array(found), np.array(expected)) == count

    def test_repeats(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bits, "_REPEATS", 2)
        assert all(row.ok for row in bits.of_repeats(gpu))
        answers = iter(range(99))

        def another_each_time(grads: Any, **_: Any) -> Any:
            return [grad + next(answers) for grad in grads[:1]]

        monkeypatch.setattr(bits, "gcx", SimpleNamespace(centralize_many=another_each_time))
        assert {row.value for row in bits.of_repeats(gpu)} == {2}


class TestCases:
    @pytest.mark.parametrize("fan_in", cases.FAN_INS[:5])
    def test_expected_is_the_mean_over_the_stated_fan_in(self, fan_in: int) -> None:
        for case, sample, expected in cases.subjects(FORMAT["float64"], fan_in):
            if not np.isfinite(sample.values).all() or "close" in sample.name:
                continue
            right = reference.centralized(sample.values, case.fan_in)
            np.testing.assert_allclose(expected, right, atol=1e-11)
            assert np.prod([case.shape[axis] for axis in case.fan_in]) == fan_in

    def test_places_in_memory(self) -> None:
        found = {
            (sample.name.split("'")[1], sample.name.rpartition(", ")[2]): sample.lay_out(
                sample.values, torch.tensor
            )
            for _, sample, _ in cases.subjects(FORMAT["float32"], 4608)
        }
        row_of_matrix = found["o...", "rows apart"].stride()
        assert row_of_matrix[-1] == 1
        assert found["o...", "off by one"].data_ptr() % 16
        assert {place for _, place in found} >= {"off by one", "rows apart", "channels last"}
        channels_last = found["io...", "channels last"]
        assert channels_last.is_contiguous(memory_format=torch.channels_last)


class TestLaunches:
    def test_counts_of_the_profiler(self, gpu: StandIn) -> None:
        gpu.seen = cuda.Profile(kernels=4, copies=1, waits=1, seconds=1.0)
        rows = list(launches.counted(gpu))
        assert len(rows) == 3 * len(DTYPES) * 3
        assert not any(row.ok for row in rows)
        gpu.seen = cuda.Profile(kernels=1, copies=0, waits=0, seconds=1.0)
        assert all(row.ok for row in launches.counted(gpu))

    def test_limits_are_what_the_kernels_launch(self, gpu: StandIn, kernels: Device) -> None:
        gpu.profile = partial(self.launch, kernels)  # type: ignore[method-assign]
        assert all(row.ok for row in launches.counted(gpu))

    def launch(self, kernels: Device, call: Any) -> cuda.Profile:
        before = len(kernels.driver.launches)
        call()
        return cuda.Profile(len(kernels.driver.launches) - before, 0, 0, 1.0)

    def test_addresses_change_where_a_row_says_so(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begins: list[int] = []
        monkeypatch.setattr(
            launches, "centralize", lambda _, grads: begins.append(grads[0].data_ptr())
        )
        same, changing = launches.host(gpu)
        calls = len(begins) // 2
        assert len(set(begins[:calls])) == 1
        assert begins[calls : calls + 4] == 2 * [*dict.fromkeys(begins)]
        assert [same.limit, changing.limit] == [60, 60]
        begins.clear()
        gpu.profile = lambda call: (call(), call(), gpu.seen)[-1]  # type: ignore[method-assign]
        next(launches.counted(gpu))
        assert len(set(begins)) == 2


class TestState:
    @pytest.mark.parametrize(
        ("answer", "found"),
        [
            (
                "580.95, 1755 MHz, 1980 MHz",
                {"driver": "580.95", "SM clock": "1755 MHz of 1980 MHz"},
            ),
            ("No devices were found", {"SM clock": "unknown: No devices were found"}),
        ],
    )
    def test_of_a_busy_gpu(
        self, answer: str, found: Any, gpu: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f'#!/bin/sh\ntest "$2" = GPU-1f && echo "{answer}"\n')
        tool.chmod(0o755)
        monkeypatch.setattr(device, "which", lambda _: str(tool))
        properties = SimpleNamespace(uuid="1f")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        assert device.Gpu.state(gpu) == found


class TestTimes:
    def test_limits_are_those_of_a_copy(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        per_byte = 1 / 4.3e12
        monkeypatch.setattr(gpu, "times", lambda calls: {"gcx": 1e-6, "copy": per_byte})
        found = [row.limit for row in times.of_models(gpu)]
        size = 2 * SMALL.elements
        assert found[0] == pytest.approx(1.10e6 * 4 * size * per_byte + 4)
        assert found[1] == pytest.approx(1.10e6 * 2 * size * per_byte + 4)
        assert len(found) == len(DTYPES) * len(times._MODELS)

    def test_all_gradients_of_a_rotation_are_centralized(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lists = []
        calls = gpu.rotation(SMALL.weights, "float32", lists.append)
        for call in calls:
            call()
        size = 4 * SMALL.elements
        assert size * len(calls) >= 4 * gpu.cache_bytes() > size * (len(calls) - 1)
        assert len({grad.data_ptr() for grads in lists for grad in grads}) == 2 * len(calls)

    def test_time_is_that_of_one_call(self, gpu: StandIn) -> None:
        gpu._clock = lambda call, _: 6.0
        found = gpu.times({"three": [int, int, int]})
        assert found["three"] == 2.0
        assert found["copy"] == 6.0 / (2 * 2 * 4 * gpu.cache_bytes())

    def test_speedup(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        seconds = {"gcx": 1.0, "the loop": 7.0, "pytorch_optimizer": 0.5}
        monkeypatch.setattr(gpu, "end_to_end", lambda calls: {k: seconds[k] for k in calls})
        rows, left_out = measure(gpu, [Part("name", "times", "against_loops")])
        verdicts = {row.what.partition(": ")[2]: row.ok for row in rows}
        assert verdicts.pop("gcx over the loop") is False
        assert bool(left_out) is not verdicts.get("gcx over pytorch_optimizer", False)
        seconds["the loop"] = 8.0
        assert all(row.ok for row in measure(gpu, [Part("name", "times", "against_loops")])[0])

    def test_missing_peer_has_a_line(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, PEER, None)
        rows, (item,) = measure(gpu, [Part("name", "times", "against_loops")])
        assert len(rows) == len(DTYPES)
        assert item.why == "not installed: pytorch_optimizer"

    def test_end_to_end_waits_after_the_last_step(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        happened: list[str] = []
        monkeypatch.setattr(gpu, "wait", lambda: happened.append("wait"))
        gpu.end_to_end({"a": lambda: happened.append("a")}, steps=3)
        assert "".join(happened[3:7]) == "aaawait"


class TestGraphs:
    @pytest.mark.parametrize("function", [graphs.replays, graphs.changing_addresses])
    def test_right_bits(self, function: Any, gpu: StandIn) -> None:
        rows = list(function(gpu))
        assert len(rows) == 2
        assert all(row.ok for row in rows)

    def test_graph_that_does_nothing(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "record", lambda _: int)
        assert not any(row.ok for row in graphs.replays(gpu))

    def test_graph_with_one_list_of_two(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(graphs, "in_turn", lambda calls: device.in_turn(calls[:1]))
        assert not any(row.ok for row in graphs.replays(gpu))

    def test_stale_addresses_are_found(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        first: list[Any] = []

        def centralize(weights: Any, grads: Any) -> Any:
            first[:] = first or grads
            return device.centralize(weights, first)

        monkeypatch.setattr(graphs, "centralize", centralize)
        assert next(graphs.changing_addresses(gpu)).value == 3 * len(graphs._WEIGHTS)


@pytest.mark.one_framework
class TestConcurrency:
    def test_both(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(programs, "_LAUNCHES", 20)
        rows = [*programs.two_streams(gpu), *programs.two_processes(gpu)]
        assert [row.value for row in rows] == [2, 0, 4, 0]
        assert all(row.ok for row in rows)


class TestStress:
    def test_no_gradient_is_wrong(self) -> None:
        assert stress.stress("cpu", 1) == 0

    def test_every_wrong_gradient_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stress, "gcx", SimpleNamespace(centralize_many=not_centralized))
        assert stress.stress("cpu", 2) == 2 * 2 * len(stress._SHAPES)


class TestPrograms:
    def test_what_they_print(self) -> None:
        command = [sys.executable, "-c", "print('done')"]
        assert programs.outputs([command] * 2, seconds=60) == ["done\n", "done\n"]

    def test_last_line_of_an_error(self) -> None:
        with pytest.raises(RuntimeError, match=r"exit code 1: ValueError: no$"):
            programs.outputs([[sys.executable, "-c", "raise ValueError('no')"]], seconds=60)

    def test_one_that_hangs_is_ended(self) -> None:
        with pytest.raises(RuntimeError, match="not done after 0 seconds"):
            programs.outputs([[sys.executable, "-c", "import time; time.sleep(60)"]], seconds=0.01)


class TestSanitizer:
    def test_it_need_not_be_there(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu.is_brief = False
        monkeypatch.setenv("PATH", "")
        for function in (programs.memcheck, programs.racecheck):
            with pytest.raises(NotRunError, match="compute-sanitizer is not on the PATH"):
                list(function(gpu))

    @pytest.mark.parametrize(("code", "ok"), [(0, True), (9, False)])
    def test_its_verdict(
        self,
        code: int,
        ok: bool,
        gpu: StandIn,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        gpu.is_brief = False
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(
            f'#!/bin/sh\necho "$@" > {tmp_path}/said\necho ERROR SUMMARY\nexit {code}\n'
        )
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        (row,), _ = measure(gpu, [Part("sanitizer", "programs", "memcheck")])
        assert row.ok is ok
        said = (tmp_path / "said").read_text(encoding="utf-8")
        assert said.startswith("--tool memcheck --report-api-errors no --error-exitcode 9")
        assert said.rstrip().endswith("-m benchmarks.gpu.bits cpu")
        if not ok:
            assert row.why == "RuntimeError: exit code 9: ERROR SUMMARY"


def is_of_gcx(step: Any) -> bool:
    return type(getattr(step, "__self__", None)).__module__.startswith("gcx")


class TestOptimizers:
    @pytest.fixture(autouse=True)
    def no_fallbacks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take torch's steps on this CPU for the kernels'."""
        monkeypatch.setattr(_torch, "is_for_kernels", lambda _: False)
        for optimizer in (gcx.torch.AdamW, gcx.torch.SGD):
            monkeypatch.setattr(optimizer, "fallbacks", [])

    def test_modules_have_the_shapes(self) -> None:
        module = optimizers.module_of(SMALL, "bfloat16", "cpu")
        shapes = [tuple(parameter.shape) for parameter in module.parameters()]
        assert shapes == [*(weight.shape for weight in SMALL.weights), *SMALL.others]
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
        assert len([row for row in gcx.torch.plan(module) if row.layout]) == len(SMALL.weights)

    def test_columns_are_centralized_as_columns(self) -> None:
        module = optimizers.module_of(COLUMNS, "float32", "cpu")
        shapes = [tuple(parameter.shape) for parameter in module.parameters()]
        assert shapes == [weight.shape for weight in COLUMNS.weights]
        before = [parameter.detach().clone() for parameter in module.parameters()]
        optimizer = gcx.torch.SGD(module, lr=1.0, overrides=optimizers.layouts_of(module))
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        pairs = zip(module.parameters(), before, COLUMNS.weights, strict=True)
        for parameter, was, weight in pairs:
            moved = (parameter.detach() - was).numpy()
            np.testing.assert_allclose(moved.mean(weight.axes), 0, atol=1e-6)
            assert np.abs(moved).max() > 0.1

    def test_both_layouts_of_a_model_are_timed(self) -> None:
        titles = {model.title: model for model in ALL_MODELS}
        layouts = {weight.layout for weight in titles["GPT-2 small"].weights}
        assert layouts == {"o...", "...o"}
        assert {w.layout for w in titles["GPT-2 small, output first"].weights} == {"o..."}

    def test_ratios(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "_clock", lambda step, _: 1.06 if is_of_gcx(step) else 1.0)
        rows = list(optimizers.times(gpu))
        assert [row.value for row in rows] == [1.06] * 4
        assert [row.ok for row in rows] == [False, True, False, True]  # limits 1.05 and 1.08

    def test_step_of_torch_is_no_step_of_gcx(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gcx.torch.AdamW, "fallbacks", ["", "no kernels"])
        for function in (optimizers.times, optimizers.against_peers, optimizers.distances):
            with pytest.raises(RuntimeError, match="torch makes the step: no kernels"):
                list(function(gpu))

    def test_peers(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        compiled: list[Any] = []
        monkeypatch.setattr(torch, "compile", lambda step, **_: compiled.append(step) or step)
        monkeypatch.setattr(gpu, "_clock", lambda step, _: 1.0 if is_of_gcx(step) else 2.0)
        monkeypatch.setitem(sys.modules, PEER, None)
        part = Part("fused step", "optimizers", "against_peers")
        rows, (item,) = measure(gpu, [part])
        assert [row.measured for row in rows] == [0.5, 0.5]
        assert len(compiled) == 1
        assert item.why.startswith("pytorch_optimizer, then torch: ")

    @pytest.mark.parametrize("name", optimizers._PEERS)
    def test_peers_make_a_centralized_step(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if name.startswith("pytorch_optimizer"):
            pytest.importorskip("pytorch_optimizer")
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        mine, module = (optimizers.module_of(SMALL, "float32", "cpu") for _ in range(2))
        gcx.torch.AdamW(mine, **optimizers._ADAMW).step()
        optimizers._PEERS[name](module, SMALL)
        for found, wanted in zip(module.parameters(), mine.parameters(), strict=True):
            torch.testing.assert_close(found, wanted)

    def test_optimizer_without_gc_is_far_off(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        without = {
            name: pair._replace(of_gcx=partial(self.without_gc, pair.of_torch))
            for name, pair in optimizers._OPTIMIZERS.items()
        }
        monkeypatch.setattr(optimizers, "_OPTIMIZERS", without)
        assert not any(row.ok for row in optimizers.distances(gpu))

    def without_gc(self, of_torch: Any, module: Any, **_: Any) -> Any:
        optimizer = of_torch(module.parameters())
        optimizer.fallbacks = []
        return optimizer


class TestEmulatedSteps:
    @pytest.fixture(autouse=True)
    def exact_options(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take powers of two, since torch's step on a CPU would round others differently."""
        options = {"AdamW": ADAMW, "SGD": {"lr": 2**-10, "momentum": 0.875, "nesterov": True}}
        pairs = {
            name: optimizers._Pair(
                partial(getattr(gcx.torch, name), **chosen),
                partial(getattr(torch.optim, name), fused=True, **chosen),
            )
            for name, chosen in options.items()
        }
        monkeypatch.setattr(optimizers, "_OPTIMIZERS", pairs)
        monkeypatch.setattr(optimizers, "_small", lambda: COLUMNS)
        monkeypatch.setattr(optimizers, "_STEPS", 6)
        monkeypatch.setattr(_fused, "is_for_kernels", lambda _: True)

    def test_parameters_are_close_to_those_of_torch(self, gpu: StandIn, kernels: Device) -> None:
        assert all(row.ok for row in optimizers.distances(gpu))
        assert {"AdamW", "SgdMomentum"} <= {*kernels.tensors}

    def test_steps_are_those_of_the_kernels(self, gpu: StandIn, kernels: Device) -> None:
        assert len([*optimizers.times(gpu)]) == 4
        assert {"AdamW", "SgdMomentum"} <= {*kernels.tensors}


@pytest.mark.skipif(not installed("jax"), reason="needs JAX")
class TestJax:
    def test_step_of_every_place(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        from benchmarks.gpu import on_jax

        seconds = {"none": 1.0, "gcx": 1.1, "optax": 1.0}

        def interleaved(candidates: Any, **_: Any) -> Any:
            for call in candidates.values():
                call()
            return {name: seconds[name] for name in candidates}

        monkeypatch.setattr(on_jax, "interleaved", interleaved)
        assert [row.ok for row in on_jax.times(gpu)] == [True, False]

    def test_jax_without_a_gpu_is_not_measured(self, gpu: StandIn) -> None:
        gpu.device = "cuda:0"
        rows, (item,) = measure(gpu, [Part("JAX", "on_jax", "times")])
        assert rows == ()
        assert (item.ok, item.why) == (True, "the first device of JAX is cpu:0")


ROW = Row(True, "time", "ResNet-50", 50.0, 60.0, "us", False, "")


class TestReport:
    def test_kept_and_missed(self) -> None:
        text = self.text(ROW, judged("speed", Measured("loop", 7.0, 8.0, "times", True)))
        assert re.search(r"time +ResNet-50 +50 us +<= 60 us +ok", text)
        assert re.search(r"speed +loop +7 times +>= 8 times +MISSED", text)
        assert text.endswith("2 rows in 12 seconds: 1 MISSED")
        error = self.text(judged("bits", Measured("bits.of_torch", nan, None), "RuntimeError: no"))
        assert re.search(r"bits +bits.of_torch +- +- +MISSED RuntimeError: no", error)

    def test_what_is_only_told_has_no_verdict(self) -> None:
        row = judged("time", Measured("gcx.centralize_many", 400.0, None, "us"))
        assert re.search(r"time +gcx.centralize_many +400 us +- +-$", self.text(row), re.MULTILINE)
        assert self.text(row).endswith("all limits are kept")

    def text(self, *rows: Row) -> str:
        ok = all(row.ok for row in rows)
        found = setting("python -m benchmarks gpu", {"cuda:0": "Some GPU"})
        return render(GpuReport(ok, found, {"SM clock before": "1 MHz"}, 4300.0, 12.3, rows, ()))


class TestCommand:
    @pytest.mark.parametrize("hip", [None, "6.4"])
    def test_there_must_be_a_gpu(
        self, hip: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(hip))
        monkeypatch.setattr(torch.version, "hip", hip)
        assert main(["gpu", "--check"]) == 2
        assert ("this is ROCm" if hip else "there is no CUDA device") in capsys.readouterr().err

    @pytest.mark.parametrize(("function", "code"), [("probe", 0), ("of_nothing", 1)])
    def test_report_is_written(
        self,
        function: str,
        code: int,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
        monkeypatch.setattr(acceptance, "Gpu", lambda *, is_brief, until: StandIn(until=until))
        monkeypatch.setattr(reports, "_RESULTS", tmp_path)
        monkeypatch.setattr(acceptance, "PARTS", [Part("probe", "times", function)])
        monkeypatch.setattr(
            times, "probe", lambda _: [Measured("what", 1.0, 2.0, "us")], raising=False
        )
        path = tmp_path / "some-gpu-check.json"
        command = ["gpu", "--check"]
        assert main(command) == code
        shown = json.loads(path.read_text(encoding="utf-8"))
        assert shown["ok"] is (code == 0)
        assert shown["setting"]["command"] == " ".join(["python -m benchmarks", *command])
        assert shown["setting"]["devices"] == {"cpu": "Some GPU"}
        assert shown["copy_gigabytes_per_second"] > 0
        clock = "1980 MHz of 1980 MHz"
        assert shown["gpu"]["SM clock before"] == shown["gpu"]["SM clock after"] == clock
        assert len(shown["rows"]) == 1
        assert ("MISSED" in capsys.readouterr().out) is (code == 1)
