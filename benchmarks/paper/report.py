"""What came out, as sections of a report, with their figures and the numbers as CSV."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.paper import figures, published, tables
from benchmarks.paper.cells import BASE, Outcome
from benchmarks.paper.labels import grouped
from benchmarks.paper.statistics import Comparison, compare_all

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
    tables.write_runs(outcomes, folder / name / "runs.csv")
    tables.write_comparisons(compare_all(outcomes), folder / name / "comparisons.csv")
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

    def table(found: Sequence[Comparison], arm: str) -> str:
        of_network = (rates or {}).get(found[0].cell.network, published.USUAL_RATE)
        return tables.table2(found, arm, of_network)

    yield from _tables(outcomes, folder, name, table, unit)


def as_map(outcomes: Sequence[Outcome], folder: Path, name: str) -> Iterator[str]:
    """Write one table and one figure of all differences."""
    found = compare_all(outcomes)
    yield tables.comparisons(found)
    yield from _forest(found, folder, name)


def as_places(outcomes: Sequence[Outcome], folder: Path, name: str) -> Iterator[str]:
    """Write a map, and compare the update with the gradient where both were centralized."""
    yield from as_map(outcomes, folder, name)
    yield from ("### The update against the gradient", "")
    both = {outcome.cell for outcome in outcomes if outcome.arm == "update"}
    arms = [o for o in outcomes if o.cell in both and o.arm in {"gradient", "update"}]
    found = compare_all(arms, base="gradient")
    tables.write_comparisons(found, folder / name / "update_against_gradient.csv")
    yield tables.comparisons(found)


def as_rates(outcomes: Sequence[Outcome], folder: Path, name: str) -> Iterator[str]:
    """Write a map of all rates, and compare each arm at the rate that is best for it."""
    yield from as_map(outcomes, folder, name)
    yield from ("### Each arm at its own best rate", "")
    yield tables.best_rates(outcomes)


def _tables(
    outcomes: Sequence[Outcome],
    folder: Path,
    name: str,
    table: Callable[[Sequence[Comparison], str], str],
    unit: str,
) -> Iterator[str]:
    (arm,) = {outcome.arm for outcome in outcomes} - {BASE}
    found = compare_all(outcomes)
    yield from _forest(found, folder, name)
    for label, group in grouped(outcomes, "task", "network").items():
        cells = {outcome.cell for outcome in group}
        curves = f"{name}-{_as_file_name(label)}.svg"
        figures.curves(group, folder / curves, unit)
        yield from (f"### {label[0].upper()}{label[1:]}", "")
        yield table([c for c in found if c.cell in cells], arm)
        yield from (f"![Training loss and test accuracy: {label}]({curves})", "")


def _forest(found: Sequence[Comparison], folder: Path, name: str) -> Iterator[str]:
    figures.forest(found, folder / f"{name}.svg")
    yield from (f"![Paired differences of the accuracy]({name}.svg)", "")


def _as_file_name(label: str) -> str:
    return re.sub(r"\W+", "-", label).strip("-").lower()
