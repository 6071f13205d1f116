"""One gradient through one target: the first bit that is not as it should be."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.agreement.compare import check_kind
from benchmarks.agreement.formats import Format
from benchmarks.agreement.gradients import Case
from benchmarks.agreement.samples import Sample
from benchmarks.agreement.targets import Target
from benchmarks.command.attempt import attempt

__all__ = ["mismatch"]


def mismatch(target: Target, sample: Sample, case: Case, kind: Format, expected: Any) -> str:
    """Say what is wrong about an answer; nothing if nothing is."""
    answer, failure = attempt(lambda: _answer(target, sample, case, kind))
    problem = failure or _first_difference(answer, expected)
    return f"{sample.name}: {problem}" if problem else ""


def _answer(target: Target, sample: Sample, case: Case, kind: Format) -> Any:
    grad = sample.lay_out(sample.values, lambda values: target.make(values, kind))
    result = target.centralize(grad, case)
    check_kind(result, grad)
    return target.to_numpy(result)


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
