"""One picture of all studies: a dot with its interval for each, at the rate tuned without GC."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import isclose
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator

from benchmarks.paper.figures import VERDICT_STYLES
from benchmarks.paper.grids import ADAM_RATE, CALM_RATE, DECAY, RATE
from benchmarks.paper.rows import read_comparisons
from benchmarks.paper.statistics import CONFIDENCE, Comparison, Verdict, as_family
from benchmarks.paper.style import save
from benchmarks.paper.tasks import ALL

__all__ = ["at_tuned_rates", "draw_overview"]

SOURCES = ("table2", "kinds")
WIDTH, ROW = 3.9, 0.2  # inches: about the width of a phone, which then shows it in its own size
SHORT = {"SGDM": "SGD", "all images": "all", "20 images a class": "20 a class"}


def draw_overview(folder: Path) -> Iterator[Path]:
    """Draw what the folder holds of `SOURCES`, once it holds all of them."""
    files = [folder / name / "comparisons.csv" for name in SOURCES]
    if all(file.exists() for file in files):
        found = at_tuned_rates([c for file in files for c in read_comparisons(file)])
        path = folder / "overview.svg"
        _draw(found, path)
        yield path


def at_tuned_rates(found: Sequence[Comparison]) -> list[Comparison]:
    """Choose those of the gradient at rates tuned without GC, as one family."""
    return as_family([c for c in found if c.arm == "gradient" and _is_at_best_rate(c)])


def _is_at_best_rate(comparison: Comparison) -> bool:
    """Tell for the digits; all of the other data is trained at the best rate."""
    cell = comparison.cell
    if not cell.task.startswith("digits"):
        return True
    sgd = CALM_RATE if (cell.task, cell.network) == (ALL.name, "group norm") else RATE
    best = {"SGDM": sgd, "Adam": ADAM_RATE[cell.network]}[cell.optimizer]
    return isclose(cell.learning_rate, best) and isclose(cell.weight_decay, DECAY)


def _group(comparison: Comparison) -> str:
    """Name the data, and the norm or network."""
    data, _, _ = comparison.cell.task.partition(", ")
    return f"{data[0].upper()}{data[1:]}, {comparison.cell.network}"


def _row(comparison: Comparison) -> str:
    """Name the optimizer, and of images how many there are."""
    cell = comparison.cell
    _, *amounts = cell.task.split(", ")
    is_of_two = cell.task.startswith(("digits", "MNIST")) and cell.network.endswith("norm")
    words = [cell.optimizer, *(amounts if is_of_two else amounts[1:])]
    return ", ".join(SHORT.get(word, word) for word in words)


def _draw(found: Sequence[Comparison], path: Path) -> None:
    groups: dict[str, list[Comparison]] = {}
    for c in found:
        groups.setdefault(_group(c), []).append(c)
    labels: list[str] = []
    figure = Figure(figsize=(WIDTH, 1.5 + ROW * (len(found) + len(groups))), layout="constrained")
    axes = figure.subplots()
    for name, rows in groups.items():
        axes.axhspan(len(labels) - 0.45, len(labels) + 0.45, color="0.93")
        labels.append(name)
        for c in rows:
            color, marker = VERDICT_STYLES[c.verdict]
            at = len(labels)
            axes.plot([c.paired.low, c.paired.high], [at, at], color=color, linewidth=2)
            filling = color if c.stands else "white"
            axes.plot([c.paired.difference], [at], marker, color=color, markerfacecolor=filling)
            labels.append(_row(c))
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.tick_params("y", length=0)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in groups else "normal")
    axes.xaxis.set_major_locator(MultipleLocator(5))
    words = f"← worse with GC | better with GC →\ndifference in points, {CONFIDENCE:.0%} interval"
    figure.suptitle(words, fontsize=10)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(alpha=0.3, axis="x")
    _add_verdicts(figure, found)
    save(figure, path)


def _add_verdicts(figure: Figure, found: Sequence[Comparison]) -> None:
    counts = Counter(c.verdict for c in found)
    figure.legend(
        handles=[
            Line2D(
                *([], []),
                color=color,
                marker=marker,
                markerfacecolor="white" if verdict is Verdict.NOT_SHOWN else color,
                label=f"{verdict}: {counts[verdict]}",
            )
            for verdict, (color, marker) in VERDICT_STYLES.items()
        ],
        title=f"filled: stands after Holm's correction for {len(found)}",
        title_fontsize=8.5,
        fontsize=8.5,
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
