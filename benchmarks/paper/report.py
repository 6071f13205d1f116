"""What came out, as sections of a report, with their figures and the numbers as CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.paper import figures, published, rows, tables
from benchmarks.paper.cells import BASE, Outcome
from benchmarks.paper.labels import as_file_name, grouped
from benchmarks.paper.statistics import Comparison, compare_all

__all__ = [
    "Write",
    "as_kinds",
    "as_map",
    "as_places",
    "as_rates",
    "as_table1",
    "as_table2",
    "as_tuning",
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
    rows.write_runs(outcomes, folder / name / "runs.csv")
    rows.write_comparisons(compare_all(outcomes), folder / name / "comparisons.csv")
    return write_section(title, name, write(outcomes, folder, name), folder)


def as_table1(
    outcomes: Sequence[Outcome], folder: Path, name: str, unit: str | None = None
) -> Iterator[str]:
    """Write a table in the supplement's layout for each task and network.

    With a unit, such as ``"epoch"``, curves of the training are drawn over it.
    """
    yield from _tables(outcomes, folder, name, tables.table1, unit)


def as_table2(
    outcomes: Sequence[Outcome],
    folder: Path,
    name: str,
    unit: str | None = None,
    rates: Mapping[tuple[str, str], Mapping[str, float]] | None = None,
) -> Iterator[str]:
    """Write the same for Table 2; `rates` of task and network stand for the paper's middle ones."""

    def table(found: Sequence[Comparison], arm: str) -> str:
        cell = found[0].cell
        here = (rates or {}).get((cell.task, cell.network), published.USUAL_RATE)
        return tables.table2(found, arm, here)

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
    rows.write_comparisons(found, folder / name / "update_against_gradient.csv")
    yield tables.comparisons(found)


def as_kinds(outcomes: Sequence[Outcome], folder: Path, name: str) -> Iterator[str]:
    """Write as `as_places` does, of tasks one of which is a regression."""
    yield "Of the regression (diabetes) the accuracy is the share of the variance explained."
    yield ""
    yield from as_places(outcomes, folder, name)


def as_rates(outcomes: Sequence[Outcome], folder: Path, name: str) -> Iterator[str]:
    """Write a map of all rates, and compare each arm at the rate that is best for it."""
    yield from as_map(outcomes, folder, name)
    yield from ("### Each at its own best rate", "")
    yield tables.best_rates(outcomes)


def as_tuning(outcomes: Sequence[Outcome], folder: Path, name: str) -> Iterator[str]:
    """Write what each rate gave without GC; the best of each row is printed in bold."""
    del folder, name
    yield tables.tuning(outcomes)


def _tables(
    outcomes: Sequence[Outcome],
    folder: Path,
    name: str,
    table: Callable[[Sequence[Comparison], str], str],
    unit: str | None,
) -> Iterator[str]:
    (arm,) = {outcome.arm for outcome in outcomes} - {BASE}
    found = compare_all(outcomes)
    yield from _forest(found, folder, name)
    for label, group in grouped(outcomes, "task", "network").items():
        cells = {outcome.cell for outcome in group}
        yield from (f"### {label[0].upper()}{label[1:]}", "")
        yield table([c for c in found if c.cell in cells], arm)
        if unit:
            curves = f"{name}-{as_file_name(label)}.svg"
            figures.curves(group, folder / curves, unit)
            yield from (f"![Training loss and test accuracy: {label}]({curves})", "")


def _forest(found: Sequence[Comparison], folder: Path, name: str) -> Iterator[str]:
    figures.forest(found, folder / f"{name}.svg")
    yield from (f"![Paired differences of the accuracy]({name}.svg)", "")
