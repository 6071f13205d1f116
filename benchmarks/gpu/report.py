"""The measurements, as data and as text."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

from benchmarks.command.libraries import LeftOut, left_out_lines
from benchmarks.throughput.setting import Setting, setting_lines
from gcx.plan import aligned

__all__ = ["GpuReport", "Measured", "NotRunError", "Row", "judged", "render"]


class Measured(NamedTuple):
    """A number that is to be at most `limit`, or at least; gcx promises nothing if that is None."""

    what: str
    value: float
    limit: float | None
    unit: str = ""
    at_least: bool = False

    @property
    def ok(self) -> bool:
        """True if the promise is kept; False if there is no number."""
        if self.limit is None:
            return isfinite(self.value)
        return self.value >= self.limit if self.at_least else self.value <= self.limit


class NotRunError(Exception):
    """A measurement is impossible here, and optional; the message gives the reason."""


@dataclass(frozen=True)
class Row:
    """One promise, and the number found."""

    ok: bool
    part: str
    what: str
    measured: float | None  # None if there is no number; then `why` has the reason
    limit: float | None  # None if nothing is promised, or there is no number
    unit: str
    at_least: bool
    why: str


def judged(part: str, found: Measured, why: str = "") -> Row:
    """Give the verdict on a number, which is NaN if an error prevented it."""
    is_number = isfinite(found.value)
    return Row(
        ok=is_number and found.ok,
        part=part,
        what=found.what,
        measured=found.value if is_number else None,
        limit=found.limit,
        unit=found.unit,
        at_least=found.at_least,
        why="" if is_number else why or f"came out as {found.value}",
    )


@dataclass(frozen=True)
class GpuReport:
    """All promises; `ok` if all that could be measured are kept."""

    ok: bool
    setting: Setting
    gpu: dict[str, str]  # versions and clocks
    copy_gigabytes_per_second: float
    seconds: float
    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...]


def render(report: GpuReport) -> str:
    """Write the report as text."""
    header = ("part", "what", "measured", "limit", "verdict")
    missed = sum(not row.ok for row in report.rows)
    verdict = "all limits are kept" if report.ok else f"{missed} MISSED"
    return "\n".join(
        [
            *setting_lines(report.setting),
            ", ".join(f"{name}: {value}" for name, value in report.gpu.items()),
            f"A copy: {report.copy_gigabytes_per_second:.0f} GB/s, read and written.",
            "Ratios are times of gcx over times of another; below 1 gcx is faster.",
            "",
            *aligned([header, *map(_cells, report.rows)], to_the_right=(2, 3)),
            "",
            *left_out_lines(report.left_out),
            f"{len(report.rows)} rows in {report.seconds:.0f} seconds: {verdict}",
        ]
    )


def _cells(row: Row) -> tuple[str, ...]:
    sense = ">=" if row.at_least else "<="
    limit = "-" if row.limit is None else f"{sense} {_number(row.limit, row.unit)}"
    measured = "-" if row.measured is None else _number(row.measured, row.unit)
    kept = "-" if row.limit is None else "ok"
    verdict = kept if row.ok else f"MISSED {row.why}".rstrip()
    return row.part, row.what, measured, limit, verdict


def _number(value: float, unit: str) -> str:
    return f"{value:.4g} {unit}".rstrip()
