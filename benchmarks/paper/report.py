"""What came out, as sections of a report, with their figures and the numbers as CSV."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.paper import figures, published, tables
from benchmarks.paper.cells import BASE, Outcome
from benchmarks.paper.labels import grouped, written
from benchmarks.paper.statistics import compare_all

__all__ = [
    "Write",
    "as_map",
    "as_places",
    "as_rates",
    "as_table1",
    "as_table2",
    "write_comparisons",
    "write_section",
]

# Write figures of some outcomes to a folder, under a name, and say in Markdown what is in them.
Write = Callable[[Sequence[Outcome], Path, str], Iterator[str]]


def write_section(title: str, name: str, lines: Iterable[str], folder: Path) -> Path:
    """Write a section in Markdown; the same lines give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    path.write_text("\n".join([f"## {title}", "", *lines]) + "\n", encoding="utf-8")
    return path


def write_comparisons(
    title: str, name: str, outcomes: Sequence[Outcome], folder: Path, write: Write
) -> Path:
    """Write a section that shows its figures, and all numbers as CSV in a folder of its name."""
    tables.write_csv(outcomes, folder / name)
    return write_section(title, name, write(outcomes, folder, name), folder)


def as_table1(
    outcomes: Sequence[Outcome], folder: Path, name: str, unit: str = "step"
) -> Iterator[str]:
    """Write a table in the supplement's layout, and curves, for each task and network.

    Curves are over steps or epochs, as `unit` says.
    """
    yield from _tables(outcomes, folder, name, tables.table1, unit)


def as_table2(
    outcomes: Sequence[Outcome],
    folder: Path,
    name: str,
    unit: str = "step",
    rates: Mapping[str, Mapping[str, float]] | None = None,
) -> Iterator[str]:
    """Write the same for Table 2; `rates` of a network stand for the paper's middle ones."""

    def table(group: list[Outcome], arm: str) -> str:
        of_network = (rates or {}).get(group[0].cell.network, published.USUAL_RATE)
        return tables.table2(group, arm, of_network)

    yield from _tables(outcomes, folder, name, table, unit)


def as_map(outcomes: Sequence[Outcome], folder: Path, name: str) -> Iterator[str]:
    """Write one table and one figure of all differences."""
    yield tables.comparisons(outcomes)
    yield from _forest(outcomes, folder, name)


def as_places(outcomes: Sequence[Outcome], folder: Path, name: str) -> Iterator[str]:
    """Write a map, and compare the update with the gradient where both were centralized."""
    yield from as_map(outcomes, folder, name)
    yield from ("### The update against the gradient", "")
    both = {outcome.cell for outcome in outcomes if outcome.arm == "update"}
    arms = ("gradient", "update")
    yield tables.comparisons(
        [outcome for outcome in outcomes if outcome.cell in both and outcome.arm in arms],
        base="gradient",
    )


def as_rates(outcomes: Sequence[Outcome], folder: Path, name: str) -> Iterator[str]:
    """Write a map of all rates, and compare each arm at the rate that is best for it."""
    yield from as_map(outcomes, folder, name)
    yield from ("### Each arm at its own best rate", "")
    yield from ("The rate of the best mean accuracy on the test set, which flatters both arms.", "")
    for label, group in grouped(outcomes, "network", "optimizer").items():
        best = [_at_best_rate(group, arm) for arm in dict.fromkeys(o.arm for o in group)]
        rates = ", ".join(
            f"{outcome.arm} at {written('learning_rate', outcome.cell.learning_rate)}"
            for outcome in best
        )
        yield from (f"{label}: {rates}.", "")
        # One cell, so that they can be compared: what differs between the two is the rate.
        yield tables.comparisons([replace(outcome, cell=best[0].cell) for outcome in best])


def _tables(
    outcomes: Sequence[Outcome],
    folder: Path,
    name: str,
    table: Callable[[list[Outcome], str], str],
    unit: str,
) -> Iterator[str]:
    (arm,) = {outcome.arm for outcome in outcomes} - {BASE}
    yield from _forest(outcomes, folder, name)
    for label, group in grouped(outcomes, "task", "network").items():
        curves = f"{name}-{_as_file_name(label)}.svg"
        figures.curves(group, folder / curves, unit)
        yield from (f"### {label[0].upper()}{label[1:]}", "", table(group, arm))
        yield from (f"![Training loss and test accuracy: {label}]({curves})", "")


def _forest(outcomes: Sequence[Outcome], folder: Path, name: str) -> Iterator[str]:
    figures.forest(compare_all(outcomes), folder / f"{name}.svg")
    yield from (f"![Paired differences of the accuracy]({name}.svg)", "")


def _at_best_rate(outcomes: Sequence[Outcome], arm: str) -> Outcome:
    of_arm = [outcome for outcome in outcomes if outcome.arm == arm]
    return max(of_arm, key=lambda outcome: float(np.mean(outcome.accuracy[:, -1])))


def _as_file_name(label: str) -> str:
    return re.sub(r"\W+", "-", label).strip("-").lower()
