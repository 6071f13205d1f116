"""What `check` found, as data and as text."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.command.left_out import LeftOut, left_out_lines
from gcx._table import aligned

__all__ = ["CheckReport", "Row", "render"]


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
class CheckReport:
    """All that was compared, and all that was not."""

    ok: bool
    seed: int
    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...]


def render(report: CheckReport) -> str:
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


def _summary(report: CheckReport) -> str:
    failed = sum(not row.ok for row in report.rows) + sum(not i.ok for i in report.left_out)
    verdict = "all agree" if report.ok else f"{failed} FAILED"
    return f"{len(report.rows)} rows, seed {report.seed}: {verdict}"
