"""What came out of the training runs, as data and as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf, isfinite, isnan
from statistics import mean, pstdev

from benchmarks.command.libraries import LeftOut, left_out_lines
from benchmarks.demo.problem import BATCH, DTYPES
from benchmarks.demo.training import LEARNING_RATE, MOMENTUM, Run, Trace
from gcx.plan import aligned

__all__ = ["Agreement", "DemoReport", "Row", "Side", "render", "summarize"]

_COMPARED = "mlp"  # in float64, so that what rounding does stays small
_COMPARED_STEPS = 100
_AGREEMENT = 1e-10


@dataclass(frozen=True)
class Side:
    """Training runs with centralization, or without: one for each seed."""

    accuracy: float  # mean, of the images for testing
    accuracy_deviation: float  # standard deviation over the seeds
    drift: float  # largest change of any unit's mean weight, in any of the runs


@dataclass(frozen=True)
class Row:
    """One network in one framework."""

    network: str
    framework: str
    dtype: str
    with_gc: Side
    without_gc: Side


@dataclass(frozen=True)
class Agreement:
    """Losses of one network with centralization, in one framework against the others."""

    ok: bool
    network: str
    frameworks: tuple[str, ...]
    steps: int
    worst: float | None  # largest relative difference; None if not finite, or nothing to compare
    limit: float


@dataclass(frozen=True)
class DemoReport:
    """All the results; `ok` if the frameworks agree and none that is installed failed to load."""

    ok: bool
    seeds: int
    steps: int
    rows: tuple[Row, ...]
    agreement: Agreement
    left_out: tuple[LeftOut, ...]
    plot: str


def summarize(traces: Mapping[Run, Trace], left_out: Iterable[LeftOut], plot: str) -> DemoReport:
    """Work the results out from the training runs."""
    left_out = tuple(left_out)
    agreement = _agreement(traces)
    pairs = dict.fromkeys((run.network, run.framework) for run in traces)
    return DemoReport(
        ok=agreement.ok and all(item.ok for item in left_out),
        seeds=len({run.seed for run in traces}),
        steps=max(len(trace.losses) for trace in traces.values()),
        rows=tuple(_row(traces, network, framework) for network, framework in pairs),
        agreement=agreement,
        left_out=left_out,
        plot=plot,
    )


def _row(traces: Mapping[Run, Trace], network: str, framework: str) -> Row:
    def side(*, centralize: bool) -> Side:
        chosen = [t for run, t in traces.items() if run[:3] == (network, framework, centralize)]
        accuracies = [trace.accuracy for trace in chosen]
        drift = max(max(trace.drift) for trace in chosen)
        return Side(mean(accuracies), pstdev(accuracies), drift)

    with_gc, without_gc = side(centralize=True), side(centralize=False)
    return Row(network, framework, DTYPES[network], with_gc, without_gc)


def _agreement(traces: Mapping[Run, Trace]) -> Agreement:
    compared = {r: t for r, t in traces.items() if r.network == _COMPARED and r.centralize}
    differences = [
        _relative_difference(a.losses[:_COMPARED_STEPS], b.losses[:_COMPARED_STEPS])
        for (one, a), (other, b) in combinations(compared.items(), 2)
        if one.seed == other.seed
    ]
    worst = max(differences, default=0.0)
    return Agreement(
        ok=worst <= _AGREEMENT,
        network=_COMPARED,
        frameworks=tuple(dict.fromkeys(run.framework for run in compared)),
        steps=max(len(trace.losses[:_COMPARED_STEPS]) for trace in compared.values()),
        worst=worst if differences and isfinite(worst) else None,
        limit=_AGREEMENT,
    )


def _relative_difference(a: Sequence[float], b: Sequence[float]) -> float:
    differences = [abs(x - y) / max(abs(x), abs(y)) for x, y in zip(a, b, strict=True)]
    return max(inf if isnan(d) else d for d in differences)


def render(report: DemoReport) -> str:
    """Write the report as text."""
    header = ("network", "framework", "dtype", *2 * ("accuracy", "drift"))
    sides = ("", "", "", "with GC", "", "without GC", "")
    lines = [
        "1,797 scanned digits of 8x8 pixels, 360 of them for testing.",
        f"SGD of learning rate {LEARNING_RATE} and momentum {MOMENTUM}.",
        f"Steps: {report.steps}, in batches of {BATCH}. Seeds: {report.seeds}.",
        "",
        *aligned([sides, header, *map(_cells, report.rows)]),
        "",
        "Accuracy: of the images for testing, mean +- standard deviation over the seeds.",
        "Drift: largest change of the mean weight of an output unit, 1^T w / M, in any run.",
        "With GC it stays zero but for rounding, whatever is learned (Corollary 4.1).",
        "",
        *left_out_lines(report.left_out),
        _agreement_line(report.agreement),
        f"Plot: {report.plot}",
    ]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    run = row.network, row.framework, row.dtype
    return *run, *_side_cells(row.with_gc), *_side_cells(row.without_gc)


def _side_cells(side: Side) -> tuple[str, str]:
    return f"{side.accuracy:.2%} +- {side.accuracy_deviation:.2%}", f"{side.drift:.1e}"


def _agreement_line(agreement: Agreement) -> str:
    if len(agreement.frameworks) < 2:
        return f"Losses in several frameworks: only {agreement.frameworks[0]} ran, none to compare."
    worst = "not finite" if agreement.worst is None else f"{agreement.worst:.1e}"
    verdict = "ok" if agreement.ok else "FAILED"
    return (
        f"Losses of the {agreement.network} with GC in {', '.join(agreement.frameworks)}: largest "
        f"relative difference in {agreement.steps} steps {worst}, limit {agreement.limit:g}: "
        f"{verdict}"
    )
