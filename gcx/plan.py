"""Plan: what happens to each parameter, and why; prints as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple, overload

from gcx._table import aligned
from gcx.layout import Layout

__all__ = ["LeaveAlone", "Plan", "PlanRow"]


class LeaveAlone(NamedTuple):
    """Answer of a layer's rule: this parameter is not centralized, for this reason.

    Attributes
    ----------
    reason : str
        Shown in the plan.

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
    name : str
        As people see it: ``"layer1.0.conv.weight"`` in torch, ``"Dense_0/kernel"`` in JAX.
    shape : tuple of int
        Shape of the parameter.
    layout : Layout or None
        How its gradient is centralized; None means left alone.
    reason : str
        Why: the rule that matched, or what speaks against it.
    view : tuple of int or None
        The shape in which the layout sees the parameter, if that is not its own: the weight of a
        grouped transposed convolution needs an axis for the groups.

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
    view: tuple[int, ...] | None = None


class Plan(Sequence[PlanRow]):
    """One row per parameter; a sequence that prints as a table.

    Parameters
    ----------
    rows : iterable of PlanRow
        In the order of the model.

    Examples
    --------
    >>> from gcx import Layout
    >>> from gcx.plan import Plan, PlanRow
    >>> plan = Plan([
    ...     PlanRow("conv.weight", (8, 3, 3, 3), Layout("o..."), "Conv2d"),
    ...     PlanRow("conv.bias", (8,), None, "bias"),
    ... ])
    >>> print(plan)
    parameter    shape    layout  reason
    conv.weight  8x3x3x3  o...    Conv2d
    conv.bias    8        -       bias
    1 of 2 parameters centralized
    >>> [row.name for row in plan if row.layout is None]
    ['conv.bias']
    """

    def __init__(self, rows: Iterable[PlanRow]) -> None:
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, index: int) -> PlanRow: ...
    @overload
    def __getitem__(self, index: slice) -> Plan: ...
    def __getitem__(self, index: int | slice) -> PlanRow | Plan:
        return Plan(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._rows == other._rows

    def __hash__(self) -> int:
        return hash(self._rows)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Rows by name, of plain Python values, for JSON.

        Returns
        -------
        dict
            ``{name: {"shape": [...], "layout": str or None, "reason": str}}``, with ``"view"``
            too where a row has one.
        """
        return {row.name: _plain(row) for row in self}

    def __str__(self) -> str:
        return "\n".join([*aligned([_HEADER, *map(_cells, self)]), self._summary()])

    def __repr__(self) -> str:
        return f"<gcx plan: {self._summary()}>"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{cell}</th>" for cell in _HEADER)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(row)) + "</tr>"
            for row in self
        )
        return f"<table><tr>{head}</tr>{body}</table><p>{self._summary()}</p>"

    def _summary(self) -> str:
        centralized = sum(row.layout is not None for row in self)
        return f"{centralized} of {len(self)} parameters centralized"


def _plain(row: PlanRow) -> dict[str, Any]:
    plain = {
        "shape": list(row.shape),
        "layout": None if row.layout is None else str(row.layout),
        "reason": row.reason,
    }
    return plain if row.view is None else {**plain, "view": list(row.view)}


_HEADER = ("parameter", "shape", "layout", "reason")


def _cells(row: PlanRow) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) or "scalar"
    return row.name, shape, "-" if row.layout is None else str(row.layout), row.reason
