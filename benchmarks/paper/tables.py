"""What came out, as Markdown and CSV; the same outcomes give the same text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from benchmarks.paper import published
from benchmarks.paper.cells import BASE, Cell, Outcome
from benchmarks.paper.labels import ARM_WORDS, GC_ON, grouped, in_common, title, varying, written
from benchmarks.paper.markdown import interval, p_value, spread, table, text
from benchmarks.paper.statistics import (
    CONFIDENCE,
    Comparison,
    Steps,
    Verdict,
    as_family,
    compare,
)

__all__ = ["best_rates", "comparisons", "table1", "table2", "tuning"]

Key = TypeVar("Key")

_DIFFERENCE = f"difference [{CONFIDENCE:.0%} interval]"
_NOT_RUN = "-"


@dataclass(frozen=True)
class _Column:
    """Of a table of the supplement: its figures, and what came out here."""

    heading: str
    figures: published.Figures
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
        raise ValueError("there is nothing to compare; give two arms of the same cells")
    base = found[0].base_arm
    names = varying(c.cell for c in found)
    header = [
        *map(title, names),
        *("GC on", "pairs", f"accuracy {ARM_WORDS[base]}", "accuracy with it", _DIFFERENCE),
        *("p (t)", "p (Holm)", "steps to a loss", "verdict"),
    ]
    rows = [
        [
            *(written(name, getattr(c.cell, name)) for name in names),
            *(GC_ON[c.arm], str(c.seeds), spread(c.base), spread(c.other), interval(c.paired)),
            *(p_value(c.paired.p), p_value(c.p_holm), _ratio(c.steps), str(c.verdict)),
        ]
        for c in found
    ]
    alike = in_common([c.cell for c in found])
    caption = f"Test accuracy in percent, mean ± sd{f' ({alike})' if alike else ''}."
    of_steps = (
        "Steps to a loss: until the running mean of the training loss is as low as that of "
        f"the runs {ARM_WORDS[base]} at half of training; over the steps that those take, median "
        "over the pairs, with the p of a sign test. Below 1 is faster."
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
        f"Each at the learning rate of its best mean accuracy: {ARM_WORDS[found[0].base_arm]}, "
        f"{ARM_WORDS[found[0].arm]}. The rate is chosen on the test set, which flatters both."
    )
    lines = table([*header, "p (t)", "p (Holm)", "verdict"], rows)
    return text(caption, "", *lines, "", _summary(found))


def tuning(outcomes: Iterable[Outcome]) -> str:
    """Mean accuracy at each learning rate that was tried; the best is printed in bold."""
    lines = []
    for label, group in grouped(outcomes, "task", "network", "optimizer").items():
        means = {o.cell.learning_rate: float(np.mean(o.accuracy[:, -1])) for o in group}
        best = max(means, key=means.__getitem__)
        tried = (
            _bold(f"{written('learning_rate', rate)}: {mean:.1f}", rate == best)
            for rate, mean in means.items()
        )
        lines.append([label, ", ".join(tried)])
    seeds = group[0].seeds
    caption = (
        "Mean test accuracy in percent (of the regression: variance explained) without GC, over "
        f"seeds {seeds[0]} to {seeds[-1]}, which no comparison uses. The best rate, in bold, is "
        "taken for the comparisons."
    )
    return text(caption, "", *table(["task, network, optimizer", "rate: accuracy"], lines))


def _arms(outcomes: Sequence[Outcome]) -> list[str]:
    """List all arms, `BASE` first."""
    return sorted({outcome.arm for outcome in outcomes}, key=lambda arm: (arm != BASE, arm))


def _at_best_rate(outcomes: Sequence[Outcome], arm: str) -> Outcome:
    of_arm = [outcome for outcome in outcomes if outcome.arm == arm]
    return max(of_arm, key=lambda outcome: float(np.mean(outcome.accuracy[:, -1])))


def _of_arm(comparisons: Iterable[Comparison], arm: str, may_vary: set[str]) -> list[Comparison]:
    found = [c for c in comparisons if c.arm == arm]
    if not found:
        raise ValueError(f"no outcome of the arm {arm!r} is there; train it, or name another")
    varies = set(varying(c.cell for c in found)) - may_vary
    if varies:
        raise ValueError(
            f"the cells differ in {sorted(varies)}; a table takes those of one value at a time"
        )
    return found


def _columns(
    found: Sequence[Comparison],
    figures: Mapping[Key, published.Figures],
    *,
    belongs: Callable[[Cell, Key], bool],
    heading: Callable[[Key], str],
) -> list[_Column]:
    """Those of the supplement, each with the comparison that belongs there."""
    for c in found:
        if not any(belongs(c.cell, key) for key in figures):
            raise ValueError(f"{c.cell} is in no column of the table; its columns are {[*figures]}")
    return [
        _Column(heading(key), of_paper, next((c for c in found if belongs(c.cell, key)), None))
        for key, of_paper in figures.items()
    ]


def _supplement_table(name: str, corner: str, columns: Sequence[_Column]) -> str:
    found = [column.ours for column in columns if column.ours]
    arm, cells = found[0].arm, [c.cell for c in found]

    def of_ours(write: Callable[[Comparison], str]) -> list[str]:
        return [write(c.ours) if c.ours else _NOT_RUN for c in columns]

    rows = [
        [
            "paper, w/o GC",
            *(_bold(spread(c.figures.without_gc), c.figures.both_bold) for c in columns),
        ],
        ["paper, w/ GC", *(_bold(spread(c.figures.with_gc)) for c in columns)],
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
        f"Ours: {in_common(cells)}, {ARM_WORDS[arm]}, {_seeds(found)} pairs of runs."
    )
    lines = table([corner, *(column.heading for column in columns)], rows)
    return text(caption, "", *lines, "", _summary(found))


def _bold(words: str, is_bold: bool = True) -> str:
    return f"**{words}**" if is_bold else words


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
