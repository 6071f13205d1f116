"""What came out, as Markdown and CSV; the same outcomes give the same text."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.paper import published
from benchmarks.paper.cells import BASE, Cell, Outcome
from benchmarks.paper.labels import grouped, in_common, title, varying, written
from benchmarks.paper.markdown import interval, p_value, spread, table, text
from benchmarks.paper.statistics import (
    CONFIDENCE,
    Comparison,
    Spread,
    Steps,
    Verdict,
    as_family,
    compare,
    half_way_loss,
    steps_to,
)

__all__ = ["best_rates", "comparisons", "table1", "table2", "write_comparisons", "write_runs"]

Key = TypeVar("Key")

_CELL_FIELDS = [f.name for f in fields(Cell)]
_DIFFERENCE = f"difference [{CONFIDENCE:.0%} interval]"
_MISSING = "not at hand"
_NOT_RUN = "-"
_RUN_COLUMNS = [*_CELL_FIELDS, "arm", "seed", "accuracy", "steps_to_loss"]
_COMPARISON_COLUMNS = [
    *_CELL_FIELDS,
    *("base", "arm", "seeds", "base_mean", "base_sd", "arm_mean", "arm_sd"),
    *("difference", "low", "high", "p_t", "p_sign_flips", "p_holm", "verdict", "stands_after_holm"),
    *("loss_level", "steps_ratio", "p_steps"),
]


@dataclass(frozen=True)
class _Column:
    """Of a table of the supplement: its figures, and what came out here."""

    heading: str
    figures: published.Figures | None
    ours: Comparison | None  # None where the cell was not run


def table1(found: Iterable[Comparison], arm: str = "gradient") -> str:
    """Weight decays, in the layout of the supplement's Table 1.

    Parameters
    ----------
    found : iterable of Comparison
        Of one task, network, optimizer and learning rate: those of `arm` (others are left out) of
        some of the table's weight decays.

    Raises
    ------
    ValueError
        Where there is none of the arm, or a cell is not of the table.
    """
    columns = _columns(
        _of_arm(found, arm, may_vary={"weight_decay"}),
        published.TABLE_1,
        belongs=lambda cell, decay: math.isclose(cell.weight_decay, decay),
        heading=lambda decay: written("weight_decay", decay),
    )
    return _supplement_table("Table 1", "weight decay", columns)


def table2(
    found: Iterable[Comparison],
    arm: str = "gradient",
    rates: Mapping[str, float] = published.USUAL_RATE,
) -> str:
    """Optimizers and learning rates, in the layout of the supplement's Table 2.

    Parameters
    ----------
    found : iterable of Comparison
        Of one task, network and weight decay: those of `arm` (others are left out) of some of the
        table's optimizers and learning rates.
    rates : mapping of str to float
        The learning rate of each optimizer that stands for the paper's middle one; the others
        stand in the same ratio to it as the paper's do.

    Raises
    ------
    ValueError
        Where there is none of the arm, or a cell is not of the table.
    """

    def rate_here(optimizer: str, rate: float) -> float:
        return rate * rates[optimizer] / published.USUAL_RATE[optimizer]

    def heading(key: tuple[str, float]) -> str:
        optimizer, rate = key
        here = rate_here(optimizer, rate)
        note = "" if math.isclose(here, rate) else f" (here {written('learning_rate', here)})"
        return f"{optimizer} {written('learning_rate', rate)}{note}"

    columns = _columns(
        _of_arm(found, arm, may_vary={"optimizer", "learning_rate"}),
        published.TABLE_2,
        belongs=lambda cell, key: (
            cell.optimizer == key[0] and math.isclose(cell.learning_rate, rate_here(*key))
        ),
        heading=heading,
    )
    return _supplement_table("Table 2", "optimizer, learning rate", columns)


def comparisons(found: Sequence[Comparison]) -> str:
    """One comparison a row, all of them with the same base.

    Raises
    ------
    ValueError
        Where there is nothing to compare.
    """
    if not found:
        msg = "there is nothing to compare; give two arms of the same cells"
        raise ValueError(msg)
    base = found[0].base_arm
    names = varying(c.cell for c in found)
    header = [
        *map(title, names),
        *("arm", "seeds", f"accuracy {base}", "accuracy of the arm", _DIFFERENCE),
        *("p (t)", "p (Holm)", "steps to a loss", "verdict"),
    ]
    rows = [
        [
            *(written(name, getattr(c.cell, name)) for name in names),
            *(c.arm, str(c.seeds), spread(c.base), spread(c.other), interval(c.paired)),
            *(p_value(c.paired.p), p_value(c.p_holm), _ratio(c.steps), str(c.verdict)),
        ]
        for c in found
    ]
    alike = in_common([c.cell for c in found])
    caption = f"Test accuracy in percent, mean ± sd{f' ({alike})' if alike else ''}."
    of_steps = (
        "Steps to a loss: until the running mean of the training loss is as low as that of "
        f"{base!r} at half of training; those of the arm over those of {base!r}, median over the "
        "seeds, with the p of a sign test. Below 1 the arm is faster."
    )
    return text(caption, "", *table(header, rows), "", _summary(found), of_steps)


def best_rates(outcomes: Iterable[Outcome]) -> str:
    """Each arm at the learning rate at which its mean accuracy is best, one network a row.

    Parameters
    ----------
    outcomes : iterable of Outcome
        Of the arm `BASE` and of another, of one task.
    """
    groups = grouped(outcomes, "network", "optimizer").values()
    pairs = [[_at_best_rate(group, arm) for arm in _arms(group)] for group in groups]
    found = as_family([compare(base, replace(arm, cell=base.cell)) for base, arm in pairs])
    header = ["network", "optimizer", "learning rates", "accuracies", _DIFFERENCE]
    rows = [
        [
            *(base.cell.network, base.cell.optimizer),
            ", ".join(written("learning_rate", o.cell.learning_rate) for o in (base, arm)),
            f"{spread(c.base)}, {spread(c.other)}",
            *(interval(c.paired), p_value(c.paired.p), p_value(c.p_holm), str(c.verdict)),
        ]
        for (base, arm), c in zip(pairs, found, strict=True)
    ]
    caption = (
        f"Each arm at the learning rate of its best mean accuracy: {found[0].base_arm}, "
        f"{found[0].arm}. The rate is chosen on the test set, which flatters both."
    )
    lines = table([*header, "p (t)", "p (Holm)", "verdict"], rows)
    return text(caption, "", *lines, "", _summary(found))


def _arms(outcomes: Sequence[Outcome]) -> list[str]:
    """List all arms, `BASE` first."""
    return sorted({outcome.arm for outcome in outcomes}, key=lambda arm: (arm != BASE, arm))


def _at_best_rate(outcomes: Sequence[Outcome], arm: str) -> Outcome:
    of_arm = [outcome for outcome in outcomes if outcome.arm == arm]
    return max(of_arm, key=lambda outcome: float(np.mean(outcome.accuracy[:, -1])))


def write_runs(outcomes: Sequence[Outcome], path: Path, base: str = BASE) -> None:
    """Write a row for each run, as CSV."""
    _write_rows(path, _RUN_COLUMNS, _run_rows(outcomes, base))


def write_comparisons(found: Sequence[Comparison], path: Path) -> None:
    """Write a row for each comparison, as CSV."""
    _write_rows(path, _COMPARISON_COLUMNS, _comparison_rows(found))


def _of_arm(comparisons: Iterable[Comparison], arm: str, may_vary: set[str]) -> list[Comparison]:
    found = [c for c in comparisons if c.arm == arm]
    if not found:
        msg = f"no outcome of the arm {arm!r} is there; train it, or name another"
        raise ValueError(msg)
    varies = set(varying(c.cell for c in found)) - may_vary
    if varies:
        msg = f"the cells differ in {sorted(varies)}; a table takes those of one value at a time"
        raise ValueError(msg)
    return found


def _columns(
    found: Sequence[Comparison],
    figures: Mapping[Key, published.Figures | None],
    *,
    belongs: Callable[[Cell, Key], bool],
    heading: Callable[[Key], str],
) -> list[_Column]:
    """Those of the supplement, each with the comparison that belongs there."""
    for c in found:
        if not any(belongs(c.cell, key) for key in figures):
            msg = f"{c.cell} is in no column of the table; its columns are {[*figures]}"
            raise ValueError(msg)
    return [
        _Column(heading(key), of_paper, next((c for c in found if belongs(c.cell, key)), None))
        for key, of_paper in figures.items()
    ]


def _supplement_table(name: str, corner: str, columns: Sequence[_Column]) -> str:
    found = [column.ours for column in columns if column.ours]
    arm, cells = found[0].arm, [c.cell for c in found]

    def of_paper(write: Callable[[published.Figures], Spread]) -> list[str]:
        return [spread(write(c.figures)) if c.figures else _MISSING for c in columns]

    def of_ours(write: Callable[[Comparison], str]) -> list[str]:
        return [write(c.ours) if c.ours else _NOT_RUN for c in columns]

    rows = [
        ["paper, w/o GC", *of_paper(lambda figures: figures.without_gc)],
        ["paper, w/ GC", *of_paper(lambda figures: figures.with_gc)],
        ["ours, w/o GC", *of_ours(lambda c: spread(c.base))],
        ["ours, w/ GC", *of_ours(lambda c: spread(c.other))],
        [_DIFFERENCE, *of_ours(lambda c: interval(c.paired))],
        ["p (t)", *of_ours(lambda c: p_value(c.paired.p))],
        ["p (sign flips)", *of_ours(lambda c: p_value(c.paired.p_sign_flips))],
        ["p (t, Holm)", *of_ours(lambda c: p_value(c.p_holm))],
        ["verdict", *of_ours(lambda c: str(c.verdict))],
    ]
    caption = (
        f"{name}. Test accuracy in percent, mean ± sd. Paper: {published.SETTING}. "
        f"Ours: {in_common(cells)}, arm {arm!r}, {_seeds(found)} seeds."
    )
    lines = table([corner, *(column.heading for column in columns)], rows)
    note = [] if all(column.figures for column in columns) else [published.NOT_AT_HAND]
    return text(caption, "", *lines, "", _summary(found), *note)


def _summary(found: Sequence[Comparison]) -> str:
    """How the differences are tested, and how many verdicts there are."""
    verdicts = Counter(c.verdict for c in found)
    counts = ", ".join(f"{verdict} {verdicts[verdict]}" for verdict in Verdict)
    return (
        "Differences are in points, of runs paired by their seed; interval and p by Student's t, "
        f"the verdict by whether the interval leaves out 0. Of {len(found)} comparisons: {counts}; "
        f"{sum(c.stands for c in found)} of these verdicts stand after Holm's correction for all "
        f"{found[0].family} that were made together."
    )


def _seeds(found: Sequence[Comparison]) -> str:
    fewest, most = min(c.seeds for c in found), max(c.seeds for c in found)
    return str(most) if fewest == most else f"{fewest} to {most}"


def _ratio(steps: Steps) -> str:
    """Write how many steps an arm takes over those of the base, and the p of the sign test."""
    if math.isnan(steps.ratio):
        return "never reached"
    ratio = "not reached" if math.isinf(steps.ratio) else f"{steps.ratio:.2f}"
    return f"{ratio} (p {p_value(steps.p)})"


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
