"""The comparison of bits says where they are equal, and where they are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.agreement import bits, canonical, gradients
from benchmarks.agreement.formats import FORMATS
from benchmarks.agreement.gradients import Case, keepdims, unit_rows
from gcx import backends
from gcx.backends import _numpy

import canonical_order
from libraries import installed
from same_bits import assert_same_bits

# Each of them is compiled by JAX twice for each dtype, so they are few; `nox -s demo` takes all.
FEW_CASES = (Case((9, 300), "o...", (1,)), Case((4, 200, 3), "oio", (1,)))

KINDS = [kind for kind in FORMATS if kind.name in canonical.DTYPES]

few = partial(bits.run, cases=FEW_CASES)

# Of the infinities among the numbers.
ignoring_infinities = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@ignoring_infinities
def test_what_it_compares_with_is_the_canonical_order(kind: Any) -> None:
    """Written a second time, since users have no tests."""
    rng = np.random.default_rng(0)
    for case in gradients.CASES_WITH_FAN_IN:
        for sample in gradients.samples(rng, case, kind):
            found = canonical.centralized(sample.values, case.fan_in, kind)
            expected = canonical_order.centralized(sample.values, case.fan_in, kind.name)
            assert_same_bits(found, expected)


def test_every_place_in_memory_holds_the_same_numbers(xp: Any) -> None:
    rng = np.random.default_rng(0)
    case = Case((4, 6, 5), "oio", (1,))
    kind = next(kind for kind in KINDS if kind.name == "float32")
    for sample in gradients.samples(rng, case, kind):
        laid_out = sample.lay_out(sample.values, lambda values: xp.asarray(values, "float32"))
        np.testing.assert_array_equal(xp.numpy(laid_out), sample.values)


def test_libraries_agree() -> None:
    names = [name for name in backends.LIBRARIES if installed(name)]
    report = few(names=names)
    assert report.ok, bits.render(report)
    checked = {(row.backend, row.dtype) for row in report.rows if "cpu" in row.device}
    on_cpu = {*names, *(["jax.jit"] if "jax" in names else [])} - {"cupy"}
    assert checked >= set(product(on_cpu, ["float64", "float32", "float16"]))
    assert {row.gradients for row in report.rows} == {18}


def test_all_gradients_are_drawn_for_numpy() -> None:
    report = bits.run(names=["numpy"])
    assert report.ok, bits.render(report)
    assert "all bits are equal" in bits.render(report)


def test_what_is_never_promised_is_listed() -> None:
    text = bits.render(few(names=["numpy"]))
    for what in ("complex and float8 dtypes", "other array libraries", "subnormal numbers in jax"):
        assert what in text


def test_seed_draws_other_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_numpy, "centralize", from_left_to_right)
    one, same, other = (few(seed, names=["numpy"]).rows for seed in (1, 1, 2))
    assert one == same
    assert one != other


# Faults, planted in the place of NumPy's backend.


def from_left_to_right(grad: Any, axes: Any, strength: float, out: Any, reproducible: bool) -> Any:
    wide = np.moveaxis(grad.astype(np.result_type(grad, "float32")), axes, range(len(axes)))
    rows = wide.reshape(-1, *wide.shape[len(axes) :])
    mean = np.cumsum(rows, axis=0)[-1] / wide.dtype.type(len(rows))
    return (grad - np.expand_dims(mean, axes)).astype(grad.dtype)


def in_the_order_of_memory(grad: Any, axes: Any, *rest: Any) -> Any:
    """Right for arrays that lie in order."""
    memory = sorted(range(grad.ndim), key=lambda axis: -abs(grad.strides[axis]))
    stored = grad.transpose(memory)
    centralized = correct(stored, tuple(sorted(memory.index(a) for a in axes)), *rest)
    return centralized.transpose(np.argsort(memory))


def by_the_reciprocal(grad: Any, axes: Any, strength: float, out: Any, reproducible: bool) -> Any:
    wide = grad.astype(np.result_type(grad, "float32"))
    rows = unit_rows(wide, axes)
    means = canonical._sums(rows) * (1 / wide.dtype.type(rows.shape[1]))
    return (wide - means.reshape(keepdims(wide.shape, axes))).astype(grad.dtype)


def padded_with_positive_zeros(grad: Any, *rest: Any) -> Any:
    return correct(grad, *rest) + grad.dtype.type(0)


def flat(grad: Any, *rest: Any) -> Any:
    return correct(grad, *rest).ravel()


def wider(grad: Any, *rest: Any) -> Any:
    return correct(grad, *rest).astype("complex128")


correct = _numpy.centralize


@pytest.mark.parametrize(
    "fault", [from_left_to_right, by_the_reciprocal, padded_with_positive_zeros]
)
def test_planted_fault_is_found_in_every_dtype(
    fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_numpy, "centralize", fault)
    report = bits.run(names=["numpy"], cases=[Case((200, 300), "o...", (1,))])
    assert not report.ok
    assert {row.ok for row in report.rows} == {False}
    for row in report.rows:
        assert 0 < row.differing <= row.gradients


def test_order_of_memory_is_found_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_numpy, "centralize", in_the_order_of_memory)
    several_axes = [Case((300, 4, 5, 5), "o...", (1, 2, 3))]
    rows = bits.run(names=["numpy"], cases=several_axes).rows
    assert {row.ok for row in rows} == {False}
    assert {row.at.split(", ")[2].split(":")[0] for row in rows} == {"axes in reverse"}


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        (wider, "ValueError: dtype is complex128, not float64"),
        (flat, "ValueError: shape is (2700,), not (9, 300)"),
    ],
)
def test_failure_is_named(
    fault: Callable[..., Any], failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_numpy, "centralize", fault)
    report = few(names=["numpy"])
    assert not report.ok
    assert failure in report.rows[0].at
    assert {(row.ok, row.differing) for row in report.rows} == {(False, 18)}


def test_first_difference_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_numpy, "centralize", from_left_to_right)
    monkeypatch.setattr(bits, "run", partial(few, names=["numpy"]))
    assert main(["agreement", "--bits"]) == 1
    shown = capsys.readouterr().out
    assert "FAILED on 9x300 'o...', numbers close to their mean, in order: element (" in shown
    dtypes = 4 if find_spec("ml_dtypes") else 3
    assert f"{dtypes} rows, seed 0: {dtypes} FAILED" in shown


def test_refusal_on_a_cpu_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise TypeError("reproducible=True is for others")

    monkeypatch.setattr(_numpy, "check_reproducible", refuse)
    report = few(names=["numpy"])
    assert not report.ok
    assert "FAILED: TypeError: reproducible=True is for others" in bits.render(report)


def test_refusal_elsewhere_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise TypeError("reproducible=True is for others")

    monkeypatch.setattr(_numpy, "check_reproducible", refuse)
    monkeypatch.setattr(_numpy, "devices", lambda: ["npu:0"])
    report = few(names=["numpy"])
    assert report.ok
    assert not report.rows
    assert "float32 in numpy on npu:0" in bits.render(report)


def test_broken_library_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ImportError("a shared object is missing")

    monkeypatch.setattr("gcx.__main__.load", fail)
    report = few(names=["numpy"])
    assert not report.ok
    assert "FAILED: broken: ImportError: a shared object is missing" in bits.render(report)


def test_json_is_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bits, "run", partial(few, names=["numpy"]))
    assert main(["agreement", "--bits", "--json", "--seed", "3"]) == 0
    shown = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert shown["seed"] == 3
    assert shown == json.loads(json.dumps(asdict(few(3, names=["numpy"]))))
