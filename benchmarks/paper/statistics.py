"""Two arms of one cell, compared over the same seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.paper.cells import BASE, Cell, Outcome
from benchmarks.paper.losses import half_way_loss, steps_to

__all__ = [
    "CONFIDENCE",
    "Comparison",
    "Paired",
    "Spread",
    "Steps",
    "Verdict",
    "as_family",
    "compare",
    "compare_all",
    "holm",
    "paired",
    "sign_flip_p",
]

CONFIDENCE = 0.95

# Accuracies are counted in these parts of a point where the test of sign flips adds them up: many
# in one image of a test set of thousands, so that rounding cannot be taken for an image.
_PARTS_OF_A_POINT = 2500


class Verdict(StrEnum):
    """What the interval of a difference says."""

    HELPS = "helps"
    NOT_SHOWN = "no difference shown"
    HURTS = "hurts"


@dataclass(frozen=True)
class Spread:
    """Of the runs of one arm; `sd` is that of a sample (ddof 1)."""

    mean: float
    sd: float


@dataclass(frozen=True)
class Paired:
    """Differences of pairs: their mean, its interval, and tests that it is 0.

    Attributes
    ----------
    difference, low, high : float
        The mean, and the ends of its interval by Student's t, in points of accuracy.
    p : float
        Of the paired t test. 0 where all differences are one number but 0: `p_sign_flips` then
        says how much that is worth.
    p_sign_flips : float
        See `sign_flip_p`.
    """

    difference: float
    low: float
    high: float
    p: float
    p_sign_flips: float

    @property
    def verdict(self) -> Verdict:
        """By whether the interval leaves out 0."""
        if self.low > 0:
            return Verdict.HELPS
        return Verdict.HURTS if self.high < 0 else Verdict.NOT_SHOWN


@dataclass(frozen=True)
class Steps:
    """How long the runs of two arms took to come down to the same loss.

    Attributes
    ----------
    level : float
        The median over the runs of the base arm, of the running mean of the loss, at half of
        training. Infinite where most of these have diverged by then.
    base, other : array, shape (seeds,)
        The first step at which the running mean is not above `level`; inf where it never is.
    ratio : float
        Median over the seeds of `other` over `base`. A pair of which neither run comes down counts
        as 1. NaN where none of all runs comes down.
    p : float
        Of the sign test on the pairs that differ: one that never comes down took longer than any
        that does.
    """

    level: float
    base: Any
    other: Any
    ratio: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """An arm against a base, in one cell.

    Attributes
    ----------
    p_holm : float
        That of the paired t test, after Holm's correction for all comparisons of the family: all
        that were made together. See `as_family`.
    family : int
        How many comparisons that are.
    """

    cell: Cell
    base_arm: str
    arm: str
    seeds: int
    base: Spread
    other: Spread
    paired: Paired
    steps: Steps
    p_holm: float
    family: int = 1

    @property
    def verdict(self) -> Verdict:
        """That of the paired differences."""
        return self.paired.verdict

    @property
    def stands(self) -> bool:
        """Whether there is a verdict that stands after Holm's correction."""
        return self.verdict is not Verdict.NOT_SHOWN and self.p_holm < 1 - CONFIDENCE


def compare_all(outcomes: Iterable[Outcome], base: str = BASE) -> list[Comparison]:
    """Every arm against the base of its cell, in the order given, as one family.

    Raises
    ------
    ValueError
        Where an arm is there twice, or without its base, or the two are no pairs (see `compare`).
    """
    outcomes = list(outcomes)
    by_name: dict[tuple[Cell, str], Outcome] = {}
    for outcome in outcomes:
        name = (outcome.cell, outcome.arm)
        if name in by_name:
            raise ValueError(f"{_name(outcome)}: given twice; give each arm of a cell once")
        by_name[name] = outcome
    for outcome in outcomes:
        if (outcome.cell, base) not in by_name:
            raise ValueError(
                f"{_name(outcome)}: its cell has no arm {base!r} to compare with; add it"
            )
    return as_family([compare(by_name[o.cell, base], o) for o in outcomes if o.arm != base])


def as_family(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Correct the p of comparisons that are made together."""
    adjusted = holm([c.paired.p for c in comparisons])
    return [
        replace(c, p_holm=p, family=len(comparisons))
        for c, p in zip(comparisons, adjusted, strict=True)
    ]


def compare(base: Outcome, other: Outcome) -> Comparison:
    """Compare the final accuracies, and the steps to a loss, of pairs of runs.

    Raises
    ------
    ValueError
        Where the two are not of one cell and the same seeds in the same order; of fewer than two
        seeds; or where an accuracy is not finite: a run that diverged has that of chance.
    """
    if base.cell != other.cell:
        raise ValueError(
            f"{_name(base)} and {_name(other)}: arms of one cell are compared, these are of two"
        )
    if base.seeds != other.seeds:
        raise ValueError(
            f"{_name(other)}: seeds {other.seeds} are no pairs with the seeds {base.seeds} of "
            f"{base.arm!r}; train both arms with the same seeds, in the same order"
        )
    before, after = _final_accuracy(base), _final_accuracy(other)
    difference = paired(after - before)
    return Comparison(
        cell=base.cell,
        base_arm=base.arm,
        arm=other.arm,
        seeds=len(base.seeds),
        base=_spread(before),
        other=_spread(after),
        paired=difference,
        steps=_compare_steps(base, other),
        p_holm=difference.p,
    )


def paired(differences: Any) -> Paired:
    """Interval and tests of the mean of two or more differences.

    References
    ----------
    Student, "The probable error of a mean", Biometrika 6, 1908.
    """
    differences = np.asarray(differences, dtype=np.float64)
    degrees = len(differences) - 1
    mean = differences.mean()
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, degrees) * error
    t = abs(mean) / error if error > 0 else (0.0 if mean == 0 else np.inf)
    return Paired(
        difference=float(mean),
        low=float(mean - half),
        high=float(mean + half),
        p=float(2 * stats.t.sf(t, degrees)),
        p_sign_flips=sign_flip_p(differences),
    )


def sign_flip_p(differences: Any) -> float:
    """How often a sum is as far from 0, over all choices of the signs of the differences.

    Without an effect each pair could as well have come the other way round. This asks for no
    normal distribution, and counts every choice. Differences are rounded to parts of a point, and
    sums that are equal but for that rounding, by half a part for each difference on either side,
    are counted as equal. Of n seeds the least p is 2 / 2**n.

    References
    ----------
    Fisher, "The design of experiments", 1935, section 21.
    """
    parts = np.rint(_PARTS_OF_A_POINT * np.asarray(differences, dtype=np.float64)).astype(np.int64)
    farthest = int(np.abs(parts).sum())
    chance = np.zeros(2 * farthest + 1)  # of each sum, from -farthest to farthest
    chance[farthest] = 1
    for part in parts:  # nothing is rolled over the ends: `farthest` is that far away
        chance = (np.roll(chance, part) + np.roll(chance, -part)) / 2
    sums = np.arange(-farthest, farthest + 1)
    return float(chance[np.abs(sums) >= abs(parts.sum()) - len(parts)].sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p of a table's tests, so that the chance of one false alarm in all is bounded.

    References
    ----------
    Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Stat. 6, 1979.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order])
    return [float(value) for value in np.minimum(adjusted, 1)]


def _compare_steps(base: Outcome, other: Outcome) -> Steps:
    level = half_way_loss(base.loss)
    before, after = steps_to(base.loss, level), steps_to(other.loss, level)
    faster, slower = int(np.sum(after < before)), int(np.sum(after > before))
    differ = faster + slower
    return Steps(
        level=level,
        base=before,
        other=after,
        ratio=_median_ratio(before, after),
        p=float(stats.binomtest(slower, differ).pvalue) if differ else 1.0,
    )


def _median_ratio(before: Any, after: Any) -> float:
    if np.isinf(before).all() and np.isinf(after).all():
        return float("nan")
    ratio = np.ones_like(before)
    np.divide(after, before, out=ratio, where=after != before)
    return float(np.median(ratio))


def _final_accuracy(outcome: Outcome) -> Any:
    """Of each run, once it is known to be one that can be compared."""
    seeds = outcome.seeds
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"{_name(outcome)}: seeds {seeds}; an interval takes two or more, each another"
        )
    for what, values in (("accuracy", outcome.accuracy), ("loss", outcome.loss)):
        if np.ndim(values) != 2 or np.shape(values)[0] != len(seeds):
            raise ValueError(
                f"{_name(outcome)}: {what} has shape {np.shape(values)}; its rows are the runs of "
                f"the {len(seeds)} seeds"
            )
    final = np.asarray(outcome.accuracy, dtype=np.float64)[:, -1]
    for seed, value in zip(seeds, final, strict=True):
        if not np.isfinite(value):
            raise ValueError(
                f"{_name(outcome)}, seed {seed}: its accuracy is {value}; count what a run that "
                "diverged gets right"
            )
    return final


def _spread(values: Any) -> Spread:
    return Spread(float(values.mean()), float(values.std(ddof=1)))


def _name(outcome: Outcome) -> str:
    return f"{outcome.arm!r} of {outcome.cell}"
