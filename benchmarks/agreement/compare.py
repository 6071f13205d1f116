"""One gradient through one target: its distance from the exact answer, and the first wrong bit."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from math import inf, isnan
from typing import Any, NamedTuple

import numpy as np

from benchmarks.agreement.formats import Format
from benchmarks.agreement.gradients import Case, Sample, centralized
from benchmarks.agreement.targets import Target
from gcx.__main__ import attempt

__all__ = [
    "Finding",
    "check_kind",
    "difference",
    "error",
    "mismatch",
]


class Finding(NamedTuple):
    """The outcome of a comparison: how many ulp apart, and on what. Infinity if not comparable."""

    ulp: float
    at: str


def error(target: Target, values: Any, case: Case, kind: Format) -> tuple[Finding, Any]:
    """Distance of a target from the exact answer; and its answer, or None if there is none."""
    answer, failure = attempt(lambda: _answer(target, target.make(values, kind), case))
    if failure:
        return Finding(inf, f"{case}: {failure}"), None
    exact = centralized(values, case.fan_in)
    return Finding(_distance(answer, exact, values, case, kind), str(case)), answer


def difference(answers: Mapping[str, Any], values: Any, case: Case, kind: Format) -> Finding:
    """Largest distance between any two answers to the same gradient, which have names."""
    findings = [
        Finding(_distance(a, b, values, case, kind), f"{case}, {one} and {other}")
        for (one, a), (other, b) in combinations(answers.items(), 2)
    ]
    return max(findings, default=Finding(0.0, str(case)))


def _answer(target: Target, grad: Any, case: Case) -> Any:
    result = target.centralize(grad, case)
    if not case.fan_in and result is not grad:
        raise ValueError("the gradient should have come back as it is")
    check_kind(result, grad)
    return target.to_numpy(result)


def check_kind(result: Any, grad: Any) -> None:
    """Raise a ValueError unless a result is the same kind of array as the gradient."""
    for trait in ("shape", "dtype", "device"):
        expected, found = getattr(grad, trait, None), getattr(result, trait, None)
        if expected != found:
            raise ValueError(f"{trait} is {found}, not {expected}")


def _distance(a: Any, b: Any, values: Any, case: Case, kind: Format) -> float:
    """In ulp of the largest magnitude in the output unit, before or after centralizing."""
    if not values.size:
        return 0.0
    # Widened, so that the difference of two narrow numbers is exact.
    a, b = (np.asarray(x, np.result_type(x, np.float64)) for x in (a, b))
    largest = np.max(np.maximum(np.abs(values), np.abs(b)), axis=case.fan_in, keepdims=True)
    distance = float(np.max(np.abs(a - b) / kind.ulp(largest)))
    return inf if isnan(distance) else distance


def mismatch(target: Target, sample: Sample, case: Case, kind: Format, expected: Any) -> str:
    """Say what is wrong about an answer; nothing if nothing is."""

    def laid_out() -> Any:
        return sample.lay_out(sample.values, lambda values: target.make(values, kind))

    answer, failure = attempt(lambda: _answer(target, laid_out(), case))
    problem = failure or _first_difference(answer, expected)
    return f"{sample.name}: {problem}" if problem else ""


def _first_difference(answer: Any, expected: Any) -> str:
    """NaN is NaN, whatever its bits: no library says which of them it makes."""
    answer = answer.astype(expected.dtype)  # which holds float16
    both_nan = np.isnan(answer) & np.isnan(expected)
    differing = np.argwhere((_bits(answer) != _bits(expected)) & ~both_nan)
    if not differing.size:
        return ""
    at = tuple(map(int, differing[0]))
    found, right = float(answer[at]).hex(), float(expected[at]).hex()
    return f"element {at} is {found}, not {right}"


def _bits(x: Any) -> Any:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").reshape(x.shape)
