"""One gradient through one target: how far it comes out from the exact answer, and from others."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from math import inf, isnan
from typing import Any, NamedTuple

import numpy as np

from benchmarks.agreement.formats import Format
from benchmarks.agreement.gradients import Case, centralized
from benchmarks.agreement.targets import Target
from benchmarks.command.attempt import attempt

__all__ = ["Finding", "check_kind", "difference", "error"]


class Finding(NamedTuple):
    """The outcome of a comparison: how many ulp apart, and on what. Infinity if not comparable."""

    ulp: float
    at: str


def error(target: Target, values: Any, case: Case, kind: Format) -> tuple[Finding, Any]:
    """Distance of a target from the exact answer; and its answer, or None if there is none."""
    answer, failure = attempt(lambda: _answer(target, values, case, kind))
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


def _answer(target: Target, values: Any, case: Case, kind: Format) -> Any:
    grad = target.make(values, kind)
    result = target.centralize(grad, case)
    if not case.fan_in and result is not grad:
        msg = "the gradient should have come back as it is"
        raise ValueError(msg)
    check_kind(result, grad)
    return target.to_numpy(result)


def check_kind(result: Any, grad: Any) -> None:
    """Raise a ValueError unless a result is the same kind of array as the gradient."""
    for trait in ("shape", "dtype", "device"):
        expected, found = getattr(grad, trait, None), getattr(result, trait, None)
        if expected != found:
            msg = f"{trait} is {found}, not {expected}"
            raise ValueError(msg)


def _distance(a: Any, b: Any, values: Any, case: Case, kind: Format) -> float:
    """In ulp of the largest magnitude in the output unit, before or after centralizing."""
    if not values.size:
        return 0.0
    # Widened, so that the difference of two narrow numbers is exact.
    a, b = (np.asarray(x, np.result_type(x, np.float64)) for x in (a, b))
    largest = np.max(np.maximum(np.abs(values), np.abs(b)), axis=case.fan_in, keepdims=True)
    distance = float(np.max(np.abs(a - b) / kind.ulp(largest)))
    return inf if isnan(distance) else distance
