"""The numbers of every library, compared with exact sums and with each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import isfinite
from typing import NamedTuple

import numpy as np

from benchmarks.agreement.compare import Finding, difference, error
from benchmarks.agreement.formats import FORMATS
from benchmarks.agreement.gradients import CASES, Case, draw
from benchmarks.agreement.targets import ARRAY_API, Subject, Target, missing_dtypes, targets_of
from benchmarks.command.libraries import LeftOut, double_precision, left_out_lines, unusable
from benchmarks.command.progress import track
from gcx.__main__ import look_up
from gcx.backends import LIBRARIES
from gcx.plan import aligned

__all__ = [
    "NumbersReport",
    "Row",
    "render",
    "run",
]


@dataclass(frozen=True)
class Row:
    """Largest error of a backend in one dtype, or largest difference between any two backends."""

    ok: bool
    backend: str
    device: str
    dtype: str
    cases: int
    worst: float | None  # in ulp; None where no number can be given, and `at` says why
    limit: float
    at: str


@dataclass(frozen=True)
class NumbersReport:
    """All that was compared, and all that was not."""

    ok: bool
    seed: int
    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...]


def render(report: NumbersReport) -> str:
    """Write the report as text."""
    header = ("dtype", "backend", "device", "gradients", "worst", "limit", "verdict")
    lines = [
        "Random gradients, centralized by each backend and by exactly rounded sums in float64.",
        "Worst error and limit in ulp (distance between neighbouring numbers of the dtype) of the",
        "largest magnitude in the output unit; 'any two': the backends against each other.",
        "",
        *aligned([header, *map(_cells, report.rows)]),
        "",
        *left_out_lines(report.left_out),
        _summary(report),
    ]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    worst = "-" if row.worst is None else f"{row.worst:.3g}"
    verdict = "ok" if row.ok else f"FAILED on {row.at}"
    return row.dtype, row.backend, row.device, str(row.cases), worst, f"{row.limit:g}", verdict


def _summary(report: NumbersReport) -> str:
    failed = sum(not row.ok for row in report.rows) + sum(not i.ok for i in report.left_out)
    verdict = "all agree" if report.ok else f"{failed} FAILED"
    return f"{len(report.rows)} rows, seed {report.seed}: {verdict}"


def run(
    seed: int = 0, *, names: Sequence[str] = LIBRARIES, cases: Sequence[Case] = CASES
) -> NumbersReport:
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
    return NumbersReport(ok, seed, rows, left_out)


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
