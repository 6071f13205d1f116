"""``python -m benchmarks gpu``, with a CPU in the place of the GPU.

What no CPU can tell is what the numbers will be. That every row is computed from what it says, and
that a fault makes it a miss, is shown here.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
import weakref
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
from benchmarks.command.libraries import LeftOut
from benchmarks.gpu import (
    acceptance,
    bits,
    cases,
    concurrency,
    graphs,
    hooks,
    launches,
    optimizers,
    programs,
    sanitizer,
    small,
    stress,
    times,
)
from benchmarks.gpu.acceptance import PARTS, Part, measure
from benchmarks.gpu.device import Recording
from benchmarks.gpu.report import GpuReport, Measured, NotRunError, Row, judged, render
from benchmarks.throughput import cuda
from benchmarks.throughput.models import DTYPES, MODELS, Model, Weight
from benchmarks.throughput.setting import setting
from gcx.backends import _torch_cuda

import reference
from gpu_standin import Launches, StandIn
from libraries import installed

SMALL = Model("small", (Weight((4, 3, 2, 2)), Weight((6, 5))), ((4,),))
COLUMNS = Model("columns", (Weight((5, 6), "...o"), Weight((3, 4))), ())
FORMAT = {kind.name: kind for kind in FORMATS}
ALL_TIMED = optimizers._TIMED


@pytest.fixture
def gpu() -> StandIn:
    return StandIn()


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take small models and few steps, and do without kernels."""
    for name in MODELS:
        monkeypatch.setitem(MODELS, name, COLUMNS if name == "gpt2" else SMALL)
    limits = tuple(limit._replace(model=SMALL) for limit in times._LIMITS)
    monkeypatch.setattr(times, "_LIMITS", limits)
    monkeypatch.setattr(graphs, "_STEPS", 3)
    monkeypatch.setattr(optimizers, "_TIMED", ((SMALL, "float32", 1.05), (SMALL, "bfloat16", 1.08)))
    monkeypatch.setattr(bits, "FAN_INS", cases.FAN_INS[:3])
    monkeypatch.setattr(_torch_cuda, "Launches", Launches)


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
        ],
    )
    def test_of_a_number(self, value: float, limit: float, at_least: bool, ok: bool) -> None:
        row = judged("part", Measured("what", value, limit, "us", at_least))
        assert row.ok is ok
        assert json.loads(json.dumps(row.measured), parse_constant=pytest.fail) in (value, None)

    @pytest.mark.parametrize(("value", "ok"), [(1.0, True), (nan, False)])
    def test_of_a_number_without_a_limit(self, value: float, ok: bool) -> None:
        measured = Measured("what", value, None, "us")
        assert measured.ok is judged("part", measured).ok is ok


def gives_two(_: Any) -> Any:
    yield Measured("first", 1, 2)
    yield Measured("second", 3, 2)


def raises_after_one(_: Any) -> Any:
    yield Measured("first", 1, 2)
    msg = "an illegal memory access\nand more"
    raise RuntimeError(msg)


def need_not_run(_: Any) -> Any:
    msg = "no such tool"
    raise NotRunError(msg)


class TestParts:
    @pytest.mark.parametrize("part", PARTS, ids=lambda part: part.place)
    def test_every_part_is_a_function(self, part: Part) -> None:
        if part.file not in ("on_cupy", "on_jax"):
            assert callable(getattr(sys.modules[f"benchmarks.gpu.{part.file}"], part.function))
        assert (Path(acceptance.__file__).parent / f"{part.file}.py").exists()

    def test_no_function_is_forgotten(self) -> None:
        files = (bits, launches, times, graphs, concurrency, optimizers, sanitizer)
        made = {
            f"{file.__name__.rpartition('.')[2]}.{name}" for file in files for name in file.__all__
        }
        no_part = {
            *("bits.bits_of", "bits.differing", "times.of_copies"),
            *("optimizers.layouts_of", "optimizers.module_of"),
        }
        assert made - no_part <= {part.place for part in PARTS}

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

    def test_nothing_is_begun_when_the_time_is_up(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gpu.until = 0.0
        (row,), _ = self.measured(gpu, monkeypatch, pytest.fail)
        assert (row.ok, row.why) == (False, "TimeoutError: the time was up")

    def test_nothing_goes_on_when_the_time_is_up(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def takes_long(gpu: StandIn) -> Any:
            gpu.until = 0.0
            yield Measured("first", 1, 2)
            pytest.fail("the time was up")

        rows, _ = self.measured(gpu, monkeypatch, takes_long)
        assert [(row.what, row.ok) for row in rows] == [("first", True), ("times.probe0", False)]

    def test_programs_are_given_the_time_that_is_left(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gpu.until = perf_counter() + 10
        gpu.is_brief = False
        monkeypatch.setattr(sanitizer, "which", lambda _: "compute-sanitizer")
        given: list[float] = []

        def outputs(commands: Any, *, seconds: float, **_: Any) -> list[str]:
            given.append(seconds)
            return ['{"launches": 0, "wrong": 0}'] * len(commands)

        for file in (concurrency, sanitizer):
            monkeypatch.setattr(file, "outputs", outputs)
        places = ("concurrency", "two_processes"), ("sanitizer", "memcheck")
        measure(gpu, [Part("name", *place) for place in places])
        assert len(given) == 2
        assert all(0 < seconds <= 10 for seconds in given)

    def test_broken_gpu_does_not_end_the_report(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu, "release", partial(raises_after_one, None).__call__)
        rows, _ = self.measured(gpu, monkeypatch, gives_two)
        assert len(rows) == 2

    def measured(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch, *functions: Any) -> Any:
        for k, function in enumerate(functions):
            monkeypatch.setattr(times, f"probe{k}", function, raising=False)
        return measure(gpu, [Part("name", "times", f"probe{k}") for k in range(len(functions))])


class TestBits:
    def test_canonical_order_has_the_bits(self, gpu: StandIn) -> None:
        rows = list(bits.of_torch(gpu))
        assert [row for row in rows if not row.ok] == []
        assert len(rows) == 4 * 3  # dtypes, ways

    @pytest.mark.parametrize("code", [0, 1])
    def test_few_of_them_for_slow_inspectors(
        self, code: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["small", "cpu"])
        if code:
            monkeypatch.setattr(bits, "gcx", SimpleNamespace(centralize_many=not_centralized))
        assert small.main() == code

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
    def test_differing(self, found: list[float], expected: list[float], count: int) -> None:
        assert bits.differing(np.array(found), np.array(expected)) == count

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
        for array in found.values():
            assert array.numel()


class TestLaunches:
    def test_counts_of_the_profiler(self, gpu: StandIn) -> None:
        gpu.seen = cuda.Profile(kernels=3, copies=2, waits=1, seconds=1.0)
        rows = list(launches.counted(gpu))
        assert len(rows) == 3 * len(DTYPES) * 3
        assert not any(row.ok for row in rows)
        gpu.seen = cuda.Profile(kernels=2, copies=1, waits=0, seconds=1.0)
        assert all(row.ok for row in launches.counted(gpu))

    def test_host(self, gpu: StandIn) -> None:
        of_hooks, elsewhere, of_function = launches.host(gpu)
        assert [row.limit for row in (of_hooks, elsewhere, of_function)] == [30, 50, None]
        assert of_hooks.what.startswith("hooks, ")
        assert elsewhere.what.startswith("hooks, ")
        assert of_function.what.startswith("gcx.centralize_many, ")

    def test_host_has_many_gradients_in_turn(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begins: list[int] = []

        def centralize_(_: Launches, grads: Any, axes: Any) -> list[int]:
            begins.append(grads[0].data_ptr())
            return []

        monkeypatch.setattr(Launches, "centralize_", centralize_)
        list(launches.host(gpu))
        calls = len(begins) // 2
        assert len(set(begins[:calls])) == 1
        assert begins[calls : calls + 4] == 2 * [*dict.fromkeys(begins)]

    def test_gradients_that_the_kernels_leave_are_an_error(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Launches, "centralize_", lambda *_: [1])
        for function in (launches.host, times.against_loops, graphs.replays):
            with pytest.raises(RuntimeError, match=r"do not take gradients \[1\]"):
                list(function(gpu))

    def test_without_kernels_there_is_a_reason(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_torch_cuda, "why_not", lambda: "Triton is not installed")
        with pytest.raises(RuntimeError, match="Triton is not installed"):
            list(launches.used(gpu))
        monkeypatch.setattr(_torch_cuda, "why_not", lambda: "")
        assert all(row.ok for row in launches.used(gpu))


class Event(SimpleNamespace):
    """As one of torch's profiler."""

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
        found = cuda.summarized(events)
        assert found == cuda.Profile(kernels=2, copies=1, waits=0, seconds=pytest.approx(4e-6))

    def test_only_waits_of_the_call_count(self) -> None:
        after = Event("cudaDeviceSynchronize", "CPU", 20, 25)
        assert cuda.summarized((*self.CALL, after)).waits == 0
        during = Event("cudaStreamSynchronize", "CPU", 15, 16)
        assert cuda.summarized((*self.CALL, after, during)).waits == 1


class TestTimes:
    def test_limits_are_those_of_a_copy(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        per_byte = 1 / 4.3e12
        monkeypatch.setattr(gpu, "times", lambda calls: {"gcx": 1e-6, "copy": per_byte})
        gpu.is_brief = False
        found = [row.limit for row in times.of_models(gpu)]
        assert found[:2] == [pytest.approx(60), pytest.approx(36)]  # ResNet-50, at that speed
        size = 2 * SMALL.elements
        assert found[2] == pytest.approx(1.10e6 * 4 * size * per_byte + 4)
        assert found[-1] == pytest.approx(1.08e6 * 2 * size * per_byte)
        assert len(found) == len(DTYPES) * len(times._LIMITS)

    def test_slower_memory_gives_more_time(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu, "times", lambda calls: {"gcx": 1e-6, "copy": 2 / 4.3e12})
        assert next(times.of_models(gpu)).limit == pytest.approx(120)

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
        seconds = {"gcx": 1.0, "the expression": 7.0, "pytorch_optimizer": 9.0}
        monkeypatch.setattr(gpu, "end_to_end", lambda calls: {k: seconds[k] for k in calls})
        verdicts = {row.what.partition(": ")[2]: row.ok for row in times.against_loops(gpu)}
        assert verdicts.pop("the expression over the hooks of gcx.torch") is False
        assert all(verdicts.values())

    def test_speedup_is_that_of_what_the_hooks_launch(
        self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[Any] = []

        def launching(weights: Any) -> Any:
            made.append(hooks.launching(weights))
            return made[-1]

        def end_to_end(candidates: Any) -> Any:
            assert candidates["gcx"].func is made[-1]
            return dict.fromkeys(candidates, 1.0)

        monkeypatch.setattr(times, "launching", launching)
        monkeypatch.setattr(gpu, "end_to_end", end_to_end)
        list(times.against_loops(gpu))
        assert len(made) == len(DTYPES)

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

    @pytest.mark.parametrize("function", [graphs.replays, graphs.changing_addresses])
    def test_gradients_that_stay_as_they_are(
        self, function: Any, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Launches, "centralize_", lambda *_: [])
        assert not any(row.ok for row in function(gpu))

    def test_what_is_recorded_lives_as_long_as_it_can_be_replayed(self) -> None:
        happened: list[str] = []
        call = partial(int)
        alive = weakref.ref(call)
        replay = Recording(SimpleNamespace(replay=lambda: happened.append("replay")), call)
        del call
        replay()
        assert happened == ["replay"]
        assert alive() is not None

    def test_stale_addresses_are_found(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        first: list[Any] = []

        def centralize_(self: Launches, grads: Any, axes: Any) -> list[int]:
            first[:] = first or grads
            for grad, fan_in in zip(first, axes, strict=True):
                gcx.centralize(grad, axis=fan_in, out=grad)
            return []

        monkeypatch.setattr(Launches, "centralize_", centralize_)
        assert next(graphs.changing_addresses(gpu)).value == 2 * len(graphs._WEIGHTS)


@pytest.mark.one_framework
class TestConcurrency:
    def test_both(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(concurrency, "_LAUNCHES", 20)
        (one, right), (two, also_right) = (
            concurrency.two_streams(gpu),
            concurrency.two_processes(gpu),
        )
        assert (one.value, two.value) == (2, 4)
        assert one.ok
        assert two.ok
        assert right.ok
        assert also_right.ok


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
        for function in (sanitizer.memcheck, sanitizer.racecheck):
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
        (row,), _ = measure(gpu, [Part("sanitizer", "sanitizer", "memcheck")])
        assert row.ok is ok
        said = (tmp_path / "said").read_text(encoding="utf-8")
        assert said.startswith("--tool memcheck --error-exitcode 9")
        assert said.rstrip().endswith("-m benchmarks.gpu.small cpu")
        if not ok:
            assert row.why == "RuntimeError: exit code 9: ERROR SUMMARY"


class TestOptimizers:
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
        titles = {model.title: model for model, *_ in ALL_TIMED}
        layouts = {weight.layout for weight in titles["GPT-2 small"].weights}
        assert layouts == {"o...", "...o"}
        assert {w.layout for w in titles["GPT-2 small, output first"].weights} == {"o..."}

    def test_ratios(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        def profile(step: Any) -> Any:
            is_of_gcx = type(step.__self__).__module__.startswith("gcx")
            return SimpleNamespace(seconds=1.06 if is_of_gcx else 1.0)

        monkeypatch.setattr(gpu, "profile", profile)
        rows = list(optimizers.times(gpu))
        assert [row.value for row in rows] == [1.06] * 4
        assert [row.ok for row in rows] == [False, True, False, True]  # limits 1.05 and 1.08

    def test_same_parameters(self, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        # On a CPU the optimizers of gcx take the fused step of torch if they are asked to.
        same = {
            name: pair._replace(of_gcx=partial(pair.of_gcx, fused=True))
            for name, pair in optimizers._OPTIMIZERS.items()
        }
        monkeypatch.setattr(optimizers, "_OPTIMIZERS", same)
        assert [row.value for row in optimizers.distances(gpu)] == [0, 0]

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
        return of_torch(module.parameters())


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

    def test_error(self) -> None:
        row = Row(False, "bits", "bits.of_torch", None, None, "", False, "RuntimeError: no")
        assert re.search(r"bits +bits.of_torch +- +- +MISSED RuntimeError: no", self.text(row))

    def test_what_is_only_told_has_no_verdict(self) -> None:
        row = judged("time", Measured("gcx.centralize_many", 400.0, None, "us"))
        assert re.search(r"time +gcx.centralize_many +400 us +- +-$", self.text(row), re.MULTILINE)
        assert self.text(row).endswith("all limits are kept")

    def test_all_kept(self) -> None:
        assert self.text(ROW).endswith("1 rows in 12 seconds: all limits are kept")

    def text(self, *rows: Row) -> str:
        ok = all(row.ok for row in rows)
        found = setting("python -m benchmarks gpu", {"cuda:0": "Some GPU"})
        return render(GpuReport(ok, found, 4300.0, 12.3, rows, ()))


class TestCommand:
    def test_no_gpu(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(["gpu"]) == 2
        assert "there is no CUDA device" in capsys.readouterr().err

    def test_rocm(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert main(["gpu"]) == 2
        assert "this is ROCm" in capsys.readouterr().err

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
        monkeypatch.setattr(acceptance, "PARTS", [Part("probe", "times", function)])
        monkeypatch.setattr(
            times, "probe", lambda _: [Measured("what", 1.0, 2.0, "us")], raising=False
        )
        path = tmp_path / "gpu.json"
        command = ["gpu", "--brief", "--json", str(path)]
        assert main(command) == code
        shown = json.loads(path.read_text(encoding="utf-8"))
        assert shown["ok"] is (code == 0)
        assert shown["setting"]["command"] == " ".join(["python -m benchmarks", *command])
        assert shown["setting"]["devices"] == {"cpu": "Some GPU"}
        assert shown["copy_gigabytes_per_second"] > 0
        assert len(shown["rows"]) == 1
        assert ("MISSED" in capsys.readouterr().out) is (code == 1)
