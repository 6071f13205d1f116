"""Put every gradient through every target, and keep the worst of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from math import isfinite
from typing import NamedTuple

import numpy as np

from benchmarks.agreement.compare import Finding, difference, error
from benchmarks.agreement.formats import FORMATS
from benchmarks.agreement.gradients import CASES, Case, draw
from benchmarks.agreement.refusals import Subject, missing_dtypes
from benchmarks.agreement.report import CheckReport, Row
from benchmarks.agreement.targets import ARRAY_API, Target, targets_of
from benchmarks.command.double_precision import double_precision
from benchmarks.command.libraries import look_up, unusable
from benchmarks.command.progress import track
from gcx.backends import LIBRARIES

__all__ = ["run"]


def run(
    seed: int = 0, *, names: Sequence[str] = LIBRARIES, cases: Sequence[Case] = CASES
) -> CheckReport:
    """Check every library that is installed here, on all of its devices.

    Parameters
    ----------
    seed : int, optional
        Of the random gradients.
    names : sequence of str, optional
        Libraries to look for.
    cases : sequence of Case, optional
        Gradients to draw, in each dtype.
    """
    libraries = [look_up(name) for name in names]
    usable = [library for library in libraries if library.state == "ok"]
    targets = [*(target for library in usable for target in targets_of(library)), ARRAY_API]
    with double_precision([library.name for library in usable]):
        missing = missing_dtypes(product(targets, FORMATS))
        rows = _compare_all(targets, set(missing), cases, seed)
    left_out = (*unusable(libraries), *missing.values())
    ok = all(row.ok for row in rows) and all(item.ok for item in left_out)
    return CheckReport(ok, seed, rows, left_out)


class _About(NamedTuple):
    """What one row of the table is about."""

    dtype: str
    backend: str
    device: str
    limit: float


def _compare_all(
    targets: Sequence[Target],
    missing: set[Subject],
    cases: Sequence[Case],
    seed: int,
) -> tuple[Row, ...]:
    rng = np.random.default_rng(seed)
    findings: dict[_About, list[Finding]] = defaultdict(list)
    for kind, case in track(list(product(FORMATS, cases)), "checking"):
        values = draw(rng, case, kind)
        answers = {}
        for target in targets:
            if (target, kind) in missing or (target.needs_fan_in and not case.fan_in):
                continue
            finding, answer = error(target, values, case, kind)
            findings[_About(kind.name, target.backend, target.device, kind.limit)] += [finding]
            if answer is not None:
                answers[str(target)] = answer
        if len(answers) > 1:
            apart = difference(answers, values, case, kind)
            findings[_About(kind.name, "any two", "any", kind.apart)] += [apart]
    return tuple(_row(about, found) for about, found in findings.items())


def _row(about: _About, findings: Sequence[Finding]) -> Row:
    ulp, at = max(findings)
    return Row(
        ok=ulp <= about.limit,
        backend=about.backend,
        device=about.device,
        dtype=about.dtype,
        cases=len(findings),
        worst=ulp if isfinite(ulp) else None,
        limit=about.limit,
        at=at,
    )
