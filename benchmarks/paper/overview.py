"""One picture of all studies: a dot with its interval for each, at the rate best without GC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import isclose
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.paper.figures import VERDICT_STYLES
from benchmarks.paper.grids import ADAM_RATE, CALM_RATE, DECAY, RATE
from benchmarks.paper.rows import read_comparisons
from benchmarks.paper.statistics import Comparison, as_family
from benchmarks.paper.style import save
from benchmarks.paper.tasks import ALL

__all__ = ["at_tuned_rates", "draw_overview"]

SOURCES = ("table2", "kinds")
UPDATE = " (update)"
WIDTH, ROW = 3.9, 0.21  # inches: a phone shows it in about its own size


def draw_overview(folder: Path) -> Iterator[Path]:
    """Draw what the folder holds of `SOURCES`, once it holds all of them."""
    files = [folder / name / "comparisons.csv" for name in SOURCES]
    if all(file.exists() for file in files):
        found = [c for file in files for c in read_comparisons(file)]
        path = folder / "overview.svg"
        _draw(at_tuned_rates(found), path)
        yield path


def at_tuned_rates(found: Sequence[Comparison]) -> list[Comparison]:
    """Choose those at the usual weight decay and the best rate without GC, as one family."""
    return as_family([c for c in found if not c.cell.task.startswith("digits") or _is_best(c)])


def _is_best(comparison: Comparison) -> bool:
    """Find those of the digits: their rates are two for SGDM, see `CALM_RATE`."""
    cell = comparison.cell
    is_calm = cell.task == ALL.name and cell.network == "group norm"
    sgd = CALM_RATE if is_calm else RATE
    best = {"SGDM": sgd, "Adam": ADAM_RATE[cell.network]}[cell.optimizer]
    return isclose(cell.learning_rate, best) and isclose(cell.weight_decay, DECAY)


def _group(comparison: Comparison) -> str:
    """Name the data and the norm."""
    data, _, rest = comparison.cell.task.partition(", ")
    network = comparison.cell.network
    if network.endswith(" norm"):
        return f"{data[0].upper()}{data[1:]}, {network}"
    return f"{data[0].upper()}{data[1:]}, {network}"


def _row(comparison: Comparison) -> str:
    _, _, amount = comparison.cell.task.partition(", ")
    few = amount if comparison.cell.network.endswith("norm") else ""
    words = {"SGDM": "SGD"}.get(comparison.cell.optimizer, comparison.cell.optimizer)
    place = UPDATE if comparison.arm == "update" else ""
    short = {"all images": "all", "20 images a class": "20 a class", "40 pixels a class": ""}
    return ", ".join(filter(None, [words + place, short.get(few, few)]))


def _draw(found: Sequence[Comparison], path: Path) -> None:
    ordered = sorted(found, key=_group)  # stable: groups in the order of their names
    groups = {name: list(rows) for name, rows in groupby(ordered, _group)}
    height = 1.3 + ROW * (len(found) + len(groups))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    ticks: list[tuple[int, str]] = []
    at = 0
    for name, rows in groups.items():
        axes.text(
            0.0,
            at,
            name,
            weight="bold",
            fontsize=8.5,
            va="center",
            transform=axes.get_yaxis_transform(),
        )
        at += 1
        for c in rows:
            color, marker = VERDICT_STYLES[c.verdict]
            filling = color if c.stands else "white"
            axes.plot([c.paired.low, c.paired.high], [at, at], color=color)
            axes.plot([c.paired.difference], [at], marker, color=color, markerfacecolor=filling)
            ticks.append((at, _row(c)))
            at += 1
    save(figure, path)
