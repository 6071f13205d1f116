"""What tells the rows of a table and the panels of a figure apart, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from benchmarks.paper.cells import BASE, Cell, Outcome

__all__ = [
    "ARM_WORDS",
    "GC_ON",
    "as_file_name",
    "describe",
    "grouped",
    "in_common",
    "title",
    "varying",
    "written",
]

# What each arm of a comparison has centralized.
GC_ON = {"gradient": "gradient", "update": "update", "conv only": "gradient, convolutions alone"}
ARM_WORDS = {BASE: "without GC", **{arm: f"with GC on the {on}" for arm, on in GC_ON.items()}}

# As the supplement writes them: a learning rate of 0.0005, a weight decay of 5e-4.
_PLAIN_FROM = {"learning_rate": 1e-4, "weight_decay": 1e-2}


def varying(cells: Iterable[Cell]) -> list[str]:
    """Names of the fields in which the cells are not all alike."""
    cells = list(cells)
    return [f.name for f in fields(Cell) if len({getattr(c, f.name) for c in cells}) > 1]


def in_common(cells: Sequence[Cell]) -> str:
    """Write what is the same in all cells, in one line."""
    differ = varying(cells)
    return describe(cells[0], [f.name for f in fields(Cell) if f.name not in differ])


def grouped(outcomes: Iterable[Outcome], *names: str) -> dict[str, list[Outcome]]:
    """Part outcomes by some fields of their cells, which the keys describe, in the order given."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(describe(outcome.cell, names), []).append(outcome)
    return groups


def describe(cell: Cell, names: Iterable[str]) -> str:
    """Write some fields of a cell: words as they are, numbers after what they are."""
    values = {name: getattr(cell, name) for name in names}
    return ", ".join(
        value if isinstance(value, str) else f"{title(name)} {written(name, value)}"
        for name, value in values.items()
    )


def title(name: str) -> str:
    """Write the name of a field of a cell."""
    return name.replace("_", " ")


def written(name: str, value: Any) -> str:
    """Write the value of a field of a cell."""
    return value if isinstance(value, str) else _short(value, plain_from=_PLAIN_FROM[name])


def _short(value: float, *, plain_from: float) -> str:
    """Write a number as 0.1, or as 5e-4 where it is below `plain_from`."""
    if value == 0 or abs(value) >= plain_from:
        return f"{value:g}"
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def as_file_name(words: str) -> str:
    """Write words as a part of the name of a file."""
    return re.sub(r"\W+", "-", words).strip("-").lower()
