"""The comparison of numbers: it agrees where it should, and finds every planted fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gcx
from benchmarks.__main__ import main
from benchmarks.agreement import bits, gradients, numbers, targets
from benchmarks.agreement.formats import FORMATS
from benchmarks.agreement.gradients import CASES, Case
from benchmarks.agreement.numbers import NumbersReport
from gcx import backends
from gcx.backends import _array_api, _numpy

import reference
from libraries import installed

# Each of them is compiled by JAX for each dtype, so they are few; `nox -s demo` takes all.
FEW_CASES = (Case((5, 3), "o...", (1,)), Case((4, 2, 3), "oio", (1,)), Case((3, 1), "o...", ()))


class TestReference:
    """What `agreement` compares with is itself compared with something else."""

    @pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
    def test_rounding_is_that_of_the_dtype(self, kind: Any) -> None:
        if kind.name.startswith(("bfloat", "float8")):
            pytest.importorskip("ml_dtypes")
        values = np.random.default_rng(0).normal(0, 1, 1000) * 2.0 ** np.arange(-12, 8).repeat(50)
        if kind.is_complex:
            values = values + 1j * values[::-1]
        expected = values.astype(_numpy._dtype(kind.name)).astype(values.dtype)
        np.testing.assert_array_equal(kind.round(values), expected)

    @pytest.mark.parametrize("case", [c for c in CASES if c.fan_in], ids=str)
    @pytest.mark.parametrize("dtype", ["float64", "complex128"])
    def test_exact_answer(self, case: Case, dtype: str) -> None:
        values = np.random.default_rng(1).normal(3, 1, case.shape).astype(dtype)
        found = gradients.centralized(values, case.fan_in)
        np.testing.assert_array_equal(found, reference.centralized(values, case.fan_in))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_stated_fan_in_is_that_of_the_layout(self, case: Case) -> None:
        axes = gcx.Layout(case.layout).fan_in_axes(len(case.shape))
        assert case.fan_in in (axes, ())


def without_gc(grad: Any, *_: Any) -> Any:
    return grad.copy()


def over_all_axes(grad: Any, *_: Any) -> Any:
    wide = grad.astype("complex64" if grad.dtype.kind == "c" else "float32")
    return (wide - wide.mean()).astype(grad.dtype)


def not_a_number(grad: Any, *_: Any) -> Any:
    return (grad * np.nan).astype(grad.dtype)


def flat(*arguments: Any) -> Any:
    return correct(*arguments).ravel()


def doubled(*arguments: Any) -> Any:
    return correct(*arguments).astype("complex128")


def raising(*_: Any) -> Any:
    raise NotImplementedError("no kernel")


def rounding_the_mean(grad: Any, axes: Any, *_: Any) -> Any:
    wide = grad.astype("complex128" if grad.dtype.kind == "c" else "float64")
    mean = wide.mean(axis=axes, keepdims=True).astype(grad.dtype)
    return (wide - mean.astype(wide.dtype)).astype(grad.dtype)


correct = _numpy.centralize
Fault = Callable[..., Any]


class TestNumbers:
    check = staticmethod(partial(numbers.run, cases=FEW_CASES))

    def test_libraries_agree(self) -> None:
        names = [name for name in backends.LIBRARIES if installed(name)]
        report = self.check(names=names)
        assert report.ok, numbers.render(report)
        checked = {row.backend for row in report.rows if row.dtype == "float32"}
        assert checked == {*names, "array API", "any two"}
        in_double = {row.backend for row in report.rows if row.dtype == "float64"}
        assert in_double == checked

    def test_all_gradients_are_drawn_for_numpy(self) -> None:
        report = numbers.run(names=["numpy"])
        assert report.ok, numbers.render(report)
        assert {row.cases for row in report.rows if row.backend == "numpy"} == {len(CASES)}

    @pytest.mark.parametrize("seed", range(1, 6))
    def test_libraries_agree_whatever_is_drawn(self, seed: int) -> None:
        report = numbers.run(seed, names=[name for name in backends.LIBRARIES if installed(name)])
        assert report.ok, numbers.render(report)

    def test_bits(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        few = partial(bits.run, names=["numpy"], cases=FEW_CASES[:1])
        monkeypatch.setattr(bits, "run", few)
        assert main(["agreement", "--bits", "--seed", "4", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(few(4))))

    def test_seed_draws_other_gradients(self) -> None:
        one, same, other = (self.check(seed, names=["numpy"]).rows for seed in (1, 1, 2))
        assert one == same
        assert one != other

    @pytest.mark.parametrize(
        "fault", [without_gc, over_all_axes, not_a_number, flat, doubled, raising]
    )
    def test_planted_fault_is_found(
        self, fault: Fault, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(_numpy, "centralize", fault)
        monkeypatch.setattr(numbers, "run", partial(self.check, names=["numpy"]))
        assert main(["agreement"]) == 1
        assert "FAILED" in capsys.readouterr().out
        assert not any(row.ok for row in self.of("numpy"))

    def test_second_rounding_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_numpy, "centralize", rounding_the_mean)
        rows = {row.dtype: row for row in self.of("numpy")}
        assert not rows["float16"].ok
        assert rows["float32"].ok

    def test_difference_between_backends_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_array_api, "centralize", without_gc)
        failed = {row.backend for row in self.check(names=["numpy"]).rows if not row.ok}
        assert failed == {"array API", "any two"}

    def test_bias_must_come_back_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def centralize(grad: Any, layout: str) -> Any:
            return gcx.centralize(grad, layout=layout) if grad.size > 3 else grad.copy()

        monkeypatch.setattr(targets, "gcx", SimpleNamespace(centralize=centralize))
        (row,) = (row for row in self.of("numpy") if row.dtype == "float32")
        assert row.worst is None
        assert row.at == "3x1 'o...': ValueError: the gradient should have come back as it is"

    def test_dtype_that_the_library_lacks_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        report = self.check_without("float64", monkeypatch)
        assert report.ok
        reasons = {item.what: item.why for item in report.left_out}
        expected = "TypeError: made float32 when asked for float64"
        assert reasons["float64 in numpy on cpu"] == expected

    def test_float32_cannot_be_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not self.check_without("float32", monkeypatch).ok

    def test_broken_library_is_a_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise ImportError("a shared object is missing")

        monkeypatch.setattr("gcx.__main__.load", fail)
        report = self.check(names=["numpy"])
        assert not report.ok
        assert "FAILED: broken: ImportError: a shared object is missing" in numbers.render(report)

    def test_json_is_the_report(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(_numpy, "centralize", not_a_number)
        monkeypatch.setattr(numbers, "run", partial(self.check, names=["numpy"]))
        main(["agreement", "--json", "--seed", "3"])
        shown = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert shown["seed"] == 3
        assert shown == json.loads(json.dumps(asdict(self.check(3, names=["numpy"]))))

    def of(self, backend: str) -> list[Any]:
        return [row for row in self.check(names=[backend]).rows if row.backend == backend]

    def check_without(self, dtype: str, monkeypatch: pytest.MonkeyPatch) -> NumbersReport:
        """Check a NumPy that makes another dtype than asked for, like JAX without float64."""
        made = {dtype: "float32" if dtype == "float64" else "float16"}
        asarray = _numpy.asarray

        def substituting(values: Any, asked: str, device: str) -> Any:
            return asarray(values, made.get(asked, asked), device)

        monkeypatch.setattr(_numpy, "asarray", substituting)
        return self.check(names=["numpy"])
