"""What came out, as CSV: a row a run, or a row a comparison, which can be read again."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper.cells import BASE, Cell, Outcome
from benchmarks.paper.losses import half_way_loss, steps_to
from benchmarks.paper.statistics import (
    Comparison,
    Paired,
    Spread,
    Steps,
)

__all__ = ["read_comparisons", "write_comparisons", "write_runs"]

_CELL_FIELDS = [f.name for f in fields(Cell)]
_RUN_COLUMNS = [*_CELL_FIELDS, "arm", "seed", "accuracy", "steps_to_loss"]
_COMPARISON_COLUMNS = [
    *_CELL_FIELDS,
    *("base", "arm", "seeds", "base_mean", "base_sd", "arm_mean", "arm_sd"),
    *("difference", "low", "high", "p_t", "p_sign_flips", "p_holm", "verdict", "stands_after_holm"),
    *("loss_level", "steps_ratio", "p_steps"),
]
_PAIRED = ("difference", "low", "high", "p_t", "p_sign_flips")
_WORDS = {"task", "network", "optimizer", "base", "arm", "verdict", "stands_after_holm"}
_NUMBERS = set(_COMPARISON_COLUMNS) - _WORDS


def write_runs(outcomes: Sequence[Outcome], path: Path, base: str = BASE) -> None:
    """Write a row for each run, as CSV."""
    _write_rows(path, _RUN_COLUMNS, _run_rows(outcomes, base))


def write_comparisons(found: Sequence[Comparison], path: Path) -> None:
    """Write a row for each comparison, as CSV."""
    _write_rows(path, _COMPARISON_COLUMNS, _comparison_rows(found))


def read_comparisons(path: Path) -> list[Comparison]:
    """Read what `write_comparisons` wrote, but for how many steps each run took to a loss."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [_comparison(row, len(rows)) for row in rows]


def _comparison(row: dict[str, str], family: int) -> Comparison:
    words = (row["task"], row["network"], row["optimizer"])
    number = {name: float(value) for name, value in row.items() if name in _NUMBERS}
    return Comparison(
        cell=Cell(*words, number["learning_rate"], number["weight_decay"]),
        base_arm=row["base"],
        arm=row["arm"],
        seeds=int(row["seeds"]),
        base=Spread(number["base_mean"], number["base_sd"]),
        other=Spread(number["arm_mean"], number["arm_sd"]),
        paired=Paired(*(number[name] for name in _PAIRED)),
        steps=Steps(number["loss_level"], None, None, number["steps_ratio"], number["p_steps"]),
        p_holm=number["p_holm"],
        family=family,
    )


def _run_rows(outcomes: Sequence[Outcome], base: str) -> Iterator[list[Any]]:
    levels = {o.cell: half_way_loss(o.loss) for o in outcomes if o.arm == base}
    for outcome in outcomes:
        steps = steps_to(outcome.loss, levels[outcome.cell])
        final = np.asarray(outcome.accuracy, dtype=np.float64)[:, -1]
        for seed, accuracy, taken in zip(outcome.seeds, final, steps, strict=True):
            yield [*astuple(outcome.cell), outcome.arm, seed, f"{accuracy:.4f}", f"{taken:.0f}"]


def _comparison_rows(found: Sequence[Comparison]) -> Iterator[list[Any]]:
    for c in found:
        accuracies = (c.base.mean, c.base.sd, c.other.mean, c.other.sd)
        differences = (c.paired.difference, c.paired.low, c.paired.high)
        p_values = (c.paired.p, c.paired.p_sign_flips, c.p_holm)
        yield [
            *(*astuple(c.cell), c.base_arm, c.arm, c.seeds),
            *(f"{value:.4f}" for value in (*accuracies, *differences)),
            *(f"{value:.6g}" for value in p_values),
            *(c.verdict, "yes" if c.stands else "no"),
            *(f"{value:.6g}" for value in (c.steps.level, c.steps.ratio, c.steps.p)),
        ]


def _write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
