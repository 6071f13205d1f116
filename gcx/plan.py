"""Plan: the decision on each parameter and its reason, as a table."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from html import escape
from math import prod
from typing import Any, NamedTuple, overload

from gcx.layout import Layout

__all__ = ["LeaveAlone", "Plan", "PlanRow"]


class LeaveAlone(NamedTuple):
    """The reason to leave a parameter alone, as the answer of a rule; a plan shows it.

    Examples
    --------
    >>> from gcx.plan import LeaveAlone
    >>> LeaveAlone("scale of a norm")
    LeaveAlone(reason='scale of a norm')
    """

    reason: str


class PlanRow(NamedTuple):
    """The decision on one parameter.

    Attributes
    ----------
    name, shape
        Path in the model, such as ``"layer1.0.conv.weight"`` in torch and ``"Dense_0/kernel"`` in
        JAX, and shape of the parameter.
    layout, reason
        Layout of its gradient, and the rule that matched; or None, and the reason to leave it
        alone, which begins with ``"unknown"`` if there is no rule.

    Examples
    --------
    >>> from gcx import Layout
    >>> from gcx.plan import PlanRow
    >>> row = PlanRow("conv.weight", (8, 3, 3, 3), Layout("o..."), "Conv2d")
    >>> row.layout.fan_in_axes(len(row.shape))
    (1, 2, 3)
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout | None
    reason: str


class Plan(Sequence[PlanRow]):
    """A sequence with one row per parameter. It prints as a table, and finds rows by name.

    Every argument `layouts` takes a plan. Above 40 rows it prints its `summary`.

    Parameters
    ----------
    rows : iterable of PlanRow
        In the order of the model.

    Examples
    --------
    >>> from gcx import Layout
    >>> from gcx.plan import Plan, PlanRow
    >>> weight = PlanRow("conv.weight", (8, 3, 3, 3), Layout("o..."), "Conv2d")
    >>> plan = Plan([weight, PlanRow("conv.bias", (8,), None, "bias")])
    >>> print(plan)
    parameter    shape    layout  reason
    conv.weight  8x3x3x3  o...    Conv2d
    conv.bias    8        -       bias
    1 of 2 parameters centralized
    >>> plan["conv.weight"].layout
    Layout('o...')
    """

    def __init__(self, rows: Iterable[PlanRow]) -> None:
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, index: int | str) -> PlanRow: ...
    @overload
    def __getitem__(self, index: slice) -> Plan: ...
    def __getitem__(self, index: int | str | slice) -> PlanRow | Plan:
        if isinstance(index, str):
            return self._find(index)
        return Plan(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._rows == other._rows

    def __hash__(self) -> int:
        return hash(self._rows)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return ``{name: {"shape": [...], "layout": str or None, "reason": str}}`` for JSON.

        For a layout that splits an axis there is ``"sizes"`` too: use ``Layout(layout, **sizes)``.
        """
        plain: dict[str, dict[str, Any]] = {}
        for name, shape, layout, reason in self:
            plain[name] = {"shape": [*shape], "layout": layout and str(layout), "reason": reason}
            if layout and layout.sizes:
                plain[name]["sizes"] = layout.sizes
        return plain

    def table(self) -> str:
        """Show one line per parameter, and their number."""
        return "\n".join([*aligned([_HEADER, *map(cells, self)]), count_centralized(self)])

    def summary(self) -> str:
        """Show the parameters by kind: one line for each reason and layout.

        A star stands for the numbers in which names differ; such a name can be a key of `layouts`.
        Unknown parameters are all named.
        """
        kinds: dict[tuple[str, Layout | None], list[PlanRow]] = {}
        for row in self:
            kinds.setdefault((row.reason, row.layout), []).append(row)
        lines = aligned([_KIND_HEADER, *map(_kind_cells, kinds.values())], to_the_right=(0, 1))
        return "\n".join([*lines, count_centralized(self)])

    def __str__(self) -> str:
        if len(self) <= _LONGEST_TABLE:
            return self.table()
        return f"{self.summary()}; plan.table() shows every row"

    def __repr__(self) -> str:
        return f"<gcx plan: {count_centralized(self)}>"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    @cached_property
    def _by_name(self) -> dict[str, PlanRow]:
        return {row.name: row for row in reversed(self._rows)}

    def _find(self, name: str) -> PlanRow:
        if name not in self._by_name:
            from difflib import get_close_matches

            near = ", ".join(map(repr, get_close_matches(name, self._by_name, cutoff=0)))
            raise KeyError(f"the plan has no row {name!r}; the nearest are {near}")
        return self._by_name[name]


_LONGEST_TABLE = 40  # rows that a person would read
_NAMES_SHOWN = 2
_HEADER = ("parameter", "shape", "layout", "reason")
_KIND_HEADER = ("parameters", "elements", "layout", "reason", "names")


def cells(row: PlanRow) -> tuple[str, str, str, str]:
    shape = "x".join(map(str, row.shape)) or "scalar"
    return row.name, shape, str(row.layout or "-"), row.reason


def count_centralized(plan: Plan) -> str:
    centralized = sum(row.layout is not None for row in plan)
    return f"{centralized} of {len(plan)} parameters centralized"


def _kind_cells(rows: list[PlanRow]) -> tuple[str, ...]:
    elements = sum(prod(row.shape) for row in rows)
    _, _, layout, reason = cells(rows[0])
    patterns = _merge_names(row.name for row in rows)
    is_unknown = reason.startswith("unknown")  # a person has to look at it
    shown = patterns if is_unknown else patterns[:_NAMES_SHOWN]
    names = ", ".join(shown) + (", ..." if len(shown) < len(patterns) else "")
    return f"{len(rows):,}", f"{elements:,}", layout, reason, names


_NUMBER = re.compile(r"(\d+)")


def _merge_names(names: Iterable[str]) -> list[str]:
    """Merge names that differ in numbers alone, with stars for these; most names come first."""
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for name in names:
        parts = _NUMBER.split(name)  # every second part is a number
        alike.setdefault(tuple(parts[::2]), []).append(parts)
    most_first = sorted(alike.values(), key=len, reverse=True)
    return [
        "".join(parts[0] if len({*parts}) == 1 else "*" for parts in zip(*together, strict=True))
        for together in most_first
    ]


def aligned(rows: Iterable[Sequence[str]], *, to_the_right: Collection[int] = ()) -> list[str]:
    """Make one line a row; each column is as wide as its widest cell."""
    columns = []
    for k, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        justify = str.rjust if k in to_the_right else str.ljust
        columns.append([justify(cell, width) for cell in column])
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
