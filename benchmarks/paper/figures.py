"""What came out, as pictures; the same outcomes give the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle
from math import ceil
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.paper.cells import Outcome
from benchmarks.paper.labels import ARM_WORDS, GC_ON, describe, in_common, varying
from benchmarks.paper.losses import running_mean, window_for
from benchmarks.paper.statistics import (
    CONFIDENCE,
    Comparison,
    Verdict,
)
from benchmarks.paper.style import ARM_COLORS, BLUE, GRAY, MORE_COLORS, VERMILION, save

__all__ = ["VERDICT_STYLES", "curves", "forest"]

VERDICT_STYLES = {
    Verdict.HELPS: (BLUE, ">"),
    Verdict.NOT_SHOWN: (GRAY, "o"),
    Verdict.HURTS: (VERMILION, "<"),
}
_GROUPS = ("task", "network")  # over the rows that have them in common
_WIDTH, _LINE = 4.6, 0.18  # inches: about as wide as a phone
_CHARACTERS = 66  # of a line of that width
_CELLS_A_ROW = 2
_POINTS_A_CURVE = 60
_ROOM_BELOW = 0.5  # points


def curves(outcomes: Iterable[Outcome], path: Path, unit: str = "step") -> None:
    """Draw training loss and test accuracy of each cell: median and quartiles over the seeds.

    Parameters
    ----------
    path : Path
        An SVG, or a PNG, by how it ends.
    unit : str
        What losses and checkpoints are counted in: ``"step"`` or ``"epoch"``.
    """
    outcomes = list(outcomes)
    cells = list(dict.fromkeys(outcome.cell for outcome in outcomes))
    names = varying(cells)
    colors = _colors(list(dict.fromkeys(outcome.arm for outcome in outcomes)))
    blocks = ceil(len(cells) / _CELLS_A_ROW)
    columns = ceil(len(cells) / blocks)
    figure = Figure(figsize=(_WIDTH, 1.8 + 3.6 * blocks), layout="constrained")
    panels = _panels(figure, len(cells), columns)
    for cell, (loss, accuracy) in zip(cells, panels, strict=True):
        of_cell = [outcome for outcome in outcomes if outcome.cell == cell]
        _draw(loss, of_cell, _loss_curve, colors)
        _draw(accuracy, of_cell, _accuracy_curve, colors)
        loss.set(yscale="log")
        loss.set_title(describe(cell, names), fontsize=9)
        accuracy.set(xlabel=unit)
        accuracy.set_ylim(bottom=min(map(_late_accuracy, of_cell)))
    for loss, accuracy in panels[::columns]:  # at the left of each row
        loss.set(ylabel="training loss (nats)")
        accuracy.set(ylabel="test accuracy (%)")
    figure.suptitle(fill(in_common(cells), _CHARACTERS), fontsize=9)
    _add_arms(figure, outcomes, colors, unit)
    save(figure, path)


def forest(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draw the paired difference of each comparison with its interval, one below the other.

    Each stands below its own words, which leaves it the whole width of a phone.

    Parameters
    ----------
    path : Path
        An SVG, or a PNG, by how it ends.
    """
    cells = [c.cell for c in comparisons]
    names = varying(cells)
    arms = list(dict.fromkeys(c.arm for c in comparisons))
    bases = dict.fromkeys(c.base_arm for c in comparisons)
    title = (
        in_common(cells),
        "Test accuracy",
        " or ".join(ARM_WORDS[arm] for arm in arms),
        f"minus {' or '.join(ARM_WORDS[base] for base in bases)}",
    )
    groups: dict[str, list[Comparison]] = {}
    for c in comparisons:
        groups.setdefault(describe(c.cell, [n for n in names if n in _GROUPS]), []).append(c)
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "in_layout": False}
    write = partial(axes.text, x=0.01, va="top", fontsize=9, **place)
    line = 0
    for words, of_group in groups.items():
        if words:
            axes.axhspan(line, line + 1, color="0.93")
            write(y=line + 0.1, s=words, weight="bold")
            line += 1
        for c in of_group:
            color, marker = VERDICT_STYLES[c.verdict]
            label = fill(_row_label(c, [n for n in names if n not in _GROUPS], arms), _CHARACTERS)
            write(y=line + 0.2, s=label)
            line += label.count("\n")
            at, filling = line + 1.5, color if c.stands else "white"
            axes.plot([c.paired.low, c.paired.high], [at, at], color=color)
            axes.plot([c.paired.difference], [at], marker, color=color, markerfacecolor=filling)
            line += 2
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set(ylim=(line, 0), yticks=[], xlabel=f"difference (points), {CONFIDENCE:.0%} interval")
    figure.set_size_inches(_WIDTH, 2.4 + _LINE * line)
    wrapped = [fill(words, _CHARACTERS) for words in title if words]
    figure.suptitle("\n".join(wrapped), fontsize=9)
    axes.grid(alpha=0.3, axis="x")
    _add_verdicts(figure, comparisons)
    save(figure, path)


def _panels(figure: Figure, count: int, columns: int) -> list[tuple[Axes, Axes]]:
    """For each cell, one of the loss and one of the accuracy below it."""
    grid = figure.subplots(2 * ceil(count / columns), columns, squeeze=False)
    above, below = grid[::2].ravel(), grid[1::2].ravel()
    for unused in (*above[count:], *below[count:]):
        unused.remove()
    return list(zip(above[:count], below[:count], strict=True))


def _draw(
    axes: Axes,
    outcomes: Iterable[Outcome],
    curve: Callable[[Outcome], tuple[Any, Any]],
    colors: dict[str, str],
) -> None:
    for outcome in outcomes:
        x, values = curve(outcome)
        with np.errstate(invalid="ignore"):  # between infinite losses, which are not drawn
            low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
        color = colors[outcome.arm]
        axes.plot(x, np.where(np.isfinite(middle), middle, np.nan), color=color, linewidth=1.2)
        drawn = np.isfinite(low) & np.isfinite(high)
        axes.fill_between(x, low, high, where=drawn, color=color, alpha=0.2, linewidth=0)
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)


def _loss_curve(outcome: Outcome) -> tuple[Any, Any]:
    steps, means = running_mean(outcome.loss)
    every = ceil(len(steps) / _POINTS_A_CURVE)
    return steps[::every], means[:, ::every]


def _accuracy_curve(outcome: Outcome) -> tuple[Any, Any]:
    return np.asarray(outcome.checkpoints), np.asarray(outcome.accuracy, dtype=np.float64)


def _late_accuracy(outcome: Outcome) -> float:
    """Lowest quartile once a fifth of training is done: all before would hide the difference."""
    checkpoints, accuracy = _accuracy_curve(outcome)
    late = accuracy[:, checkpoints >= checkpoints[-1] / 5]
    return float(np.quantile(late, 0.25, axis=0).min()) - _ROOM_BELOW


def _colors(arms: Sequence[str]) -> dict[str, str]:
    others = [arm for arm in arms if arm not in ARM_COLORS]
    known = ARM_COLORS | dict(zip(others, cycle(MORE_COLORS), strict=False))
    return {arm: known[arm] for arm in arms}


def _add_arms(
    figure: Figure, outcomes: Sequence[Outcome], colors: dict[str, str], unit: str
) -> None:
    seeds = _range(len(outcome.seeds) for outcome in outcomes)
    window = _range(window_for(outcome.loss) for outcome in outcomes)
    figure.legend(
        handles=[
            Line2D([], [], color=color, linewidth=4, label=ARM_WORDS[arm])
            for arm, color in colors.items()
        ],
        title=(
            f"line: median over the seeds ({seeds}); band: between the quartiles\n"
            f"loss: mean of the last {window} {unit}s"
        ),
        loc="outside lower center",
        ncols=1,
        frameon=False,
    )


def _add_verdicts(figure: Figure, comparisons: Sequence[Comparison]) -> None:
    counts = Counter(c.verdict for c in comparisons)
    figure.legend(
        handles=[
            Line2D(
                *([], []),
                color=color,
                marker=marker,
                markerfacecolor="white" if verdict is Verdict.NOT_SHOWN else color,
                label=f"{verdict} ({counts[verdict]})",
            )
            for verdict, (color, marker) in VERDICT_STYLES.items()
        ],
        title=(
            f"mean of pairs of equal seeds ({_range(c.seeds for c in comparisons)})\n"
            f"filled: stands after Holm's correction for all {len(comparisons)}"
        ),
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )


def _row_label(comparison: Comparison, names: Sequence[str], arms: Sequence[str]) -> str:
    arm = [f"GC on the {GC_ON[comparison.arm]}"] if len(arms) > 1 else []
    return ", ".join([*filter(None, [describe(comparison.cell, names)]), *arm])


def _range(counts: Iterable[int]) -> str:
    ordered = sorted(set(counts))
    return " to ".join(str(count) for count in dict.fromkeys((ordered[0], ordered[-1])))
