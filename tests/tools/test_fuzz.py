"""The campaign of random calls: it passes, repeats a trial, and finds planted faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import gcx
from benchmarks.__main__ import main
from benchmarks.fuzz import run as fuzz
from gcx import backends
from gcx.backends import _numpy

from libraries import installed

correct, correct_many = _numpy.centralize, _numpy.centralize_many


def test_libraries_pass() -> None:
    names = [name for name in backends.LIBRARIES if installed(name)]
    report = fuzz.run(1, 300, names=names)
    assert report.ok, fuzz.render(report)
    assert {row.backend for row in report.rows} - {"array_api_strict"} == set(names)
    assert all(row.trials for row in report.rows)


def test_options_draw_the_same_trials(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "run", partial(fuzz.run, names=["numpy"]))
    assert main(["fuzz", "--trials", "30", "--seed", "2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert sum(row["trials"] for row in shown["rows"]) == shown["trials"] == 30


def without_gc(grad: Any, axes: Any, strength: Any, out: Any, *_: Any) -> Any:
    return grad.copy() if out is None else out


def over_one_axis(grad: Any, axes: Any, *rest: Any) -> Any:
    return correct(grad, axes[:1], *rest)


def at_full_strength(grad: Any, axes: Any, _: Any, *rest: Any) -> Any:
    return correct(grad, axes, 1.0, *rest)


def in_place(grad: Any, axes: Any, strength: Any, out: Any, *rest: Any) -> Any:
    return correct(grad, axes, strength, grad if out is None else out, *rest)


def beside_out(grad: Any, axes: Any, strength: Any, out: Any, *rest: Any) -> Any:
    result = correct(grad, axes, strength, out, *rest)
    if out is not None and grad.flags.writeable:
        grad[...] = result
    return result


def returning_a_copy(*arguments: Any) -> Any:
    return correct(*arguments).copy()


def in_any_order(grad: Any, axes: Any, strength: Any, out: Any, _: Any) -> Any:
    return correct(grad, axes, strength, out, False)


def raising(*_: Any) -> Any:
    raise NotImplementedError


@pytest.mark.parametrize(
    "fault",
    [
        without_gc,
        over_one_axis,
        at_full_strength,
        in_place,
        beside_out,
        returning_a_copy,
        in_any_order,
        raising,
    ],
)
def test_planted_fault_is_found(fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_numpy, "centralize", fault)
    report = fuzz.run(0, 400, names=["numpy"])
    assert not report.ok
    # The number of a failed trial repeats it alone.
    number = int(report.failures[0].split("trial ")[1].split(":")[0])
    (failure,) = fuzz.run(0, 1, first=number, names=["numpy"]).failures
    assert failure == report.failures[0]


def test_written_before_an_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    many = gcx.centralize_many

    def writing(grads: Any, **options: Any) -> Any:
        for out in options["out"] or ():
            np.copyto(out, 5)
        return many(grads, **options)

    monkeypatch.setattr(gcx, "centralize_many", writing)
    report = fuzz.run(0, 400, names=["numpy"])
    assert any("an array was changed" in failure for failure in report.failures)
