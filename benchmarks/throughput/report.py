"""What was measured, as data and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.command.libraries import LeftOut, left_out_lines
from benchmarks.throughput.setting import Setting, setting_lines
from benchmarks.throughput.workload import EXPRESSION
from gcx.plan import aligned

__all__ = ["BenchReport", "Row", "render"]


@dataclass(frozen=True)
class Row:
    """All weight gradients of a model, centralized by one call of gcx."""

    model: str
    dtype: str
    library: str
    device: str
    weights: int
    bytes: int  # of all gradients, read once and written once
    microseconds: float
    gigabytes_per_second: float  # of `bytes`
    copy_gigabytes_per_second: float  # of a copy by the same library, which took turns with gcx
    over_copy: float  # the time of gcx over that of the copy
    ratios: dict[str, float]  # the time of gcx over that of the expression and of peers
    host_microseconds: float | None  # until the call is back; None where that is when all is done
    launches: int | None  # of kernels; None where nobody counts


@dataclass(frozen=True)
class BenchReport:
    """All that was measured, and all that was not; `ok` unless something failed."""

    ok: bool
    setting: Setting
    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...]
    plot: str | None


_HEADER = (
    "model",
    "dtype",
    "library",
    "device",
    "gcx",
    "GB/s",
    "over a copy",
    "expression",
    "peer",
    "host",
    "launches",
)
_TO_THE_RIGHT = (4, 5, 6, 7, 8, 9, 10)


def render(report: BenchReport) -> str:
    """Write the report as text."""
    lines = [
        *setting_lines(report.setting),
        "",
        *aligned([_HEADER, *map(_cells, report.rows)], to_the_right=_TO_THE_RIGHT),
        "",
        "gcx: time to centralize all weight gradients of the model, by one call.",
        "GB/s: each gradient read once and written once.",
        "Over a copy, expression, peer: the time of gcx over theirs, below 1 gcx is faster.",
        "  They are a copy of as many bytes by the same library, and for each gradient",
        "  g -= g.mean(fan_in) in a loop and other packages. Only peers that are installed, and",
        "  know the axes: those of GPT-2's weights (in, out) are known to none.",
        "Host: until the call is back, where a GPU works on. Launches: of GPU kernels, in a call.",
        "",
        *left_out_lines(report.left_out),
    ]
    if report.plot:
        lines.append(f"Plot: {report.plot}")
    return "\n".join(lines).rstrip("\n")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.model,
        row.dtype,
        row.library,
        row.device,
        _time(row.microseconds),
        f"{row.gigabytes_per_second:.1f}",
        f"{row.over_copy:.2f}",
        f"{row.ratios[EXPRESSION]:.2f}",
        ", ".join(_peers(row.ratios)) or "-",
        "-" if row.host_microseconds is None else _time(row.host_microseconds),
        "-" if row.launches is None else str(row.launches),
    )


def _peers(ratios: Mapping[str, float]) -> list[str]:
    return [f"{ratio:.2f} {name}" for name, ratio in ratios.items() if name != EXPRESSION]


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f} us" if microseconds < 1e4 else f"{1e-3 * microseconds:.1f} ms"
