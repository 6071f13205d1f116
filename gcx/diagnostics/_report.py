"""The report: per parameter the share of the gradient's energy that GC removes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from gcx._table import aligned, html_table
from gcx.diagnostics._energy import Energy, fan_in_size
from gcx.layout import Layout
from gcx.plan import PlanRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EnergyReport", "EnergyRow", "Share", "report_of"]


class Share(NamedTuple):
    """The share of a gradient's energy that Gradient Centralization removes, from 0 to 1.

    Attributes
    ----------
    removed : float
        Over all batches: the sum of the energies removed, divided by the sum of the energies. A
        batch counts by the energy of its gradient, so that one with next to none does not matter.
    lowest, highest : float
        The least and the largest share in a batch by itself.
    by_chance : float
        What is to be expected if the elements are independent, with mean zero and equal variance:
        1 / M, where M is the fan-in.

    Examples
    --------
    >>> from gcx.diagnostics import Share
    >>> share = Share(removed=0.5, lowest=0.25, highest=0.75, by_chance=0.125)
    >>> share.removed / share.by_chance
    4.0
    """

    removed: float
    lowest: float
    highest: float
    by_chance: float


class EnergyRow(NamedTuple):
    """What Gradient Centralization would do to the gradient of one parameter.

    Attributes
    ----------
    name : str
        As in the plan.
    shape : tuple of int
        Shape of the parameter.
    layout : Layout or None
        How its gradient would be centralized; None means left alone.
    reason : str
        That of the plan, and why there is no share, if there is a layout.
    share : Share or None
        None if the parameter is left alone, or the share is not defined: the gradient is zero or
        not finite, or there is none.

    Examples
    --------
    >>> from gcx.diagnostics import EnergyRow
    >>> EnergyRow("conv.bias", (8,), None, "bias", None).share is None
    True
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout | None
    reason: str
    share: Share | None


@dataclass(frozen=True)
class EnergyReport:
    """What Gradient Centralization would do to the gradient of a model; prints as a table.

    Attributes
    ----------
    rows : tuple of EnergyRow
        One per parameter, also of those that are left alone.
    total : Share or None
        The share in the gradient of all parameters together, those left alone included; None if
        that is zero or not finite.
    batches : int
        How many were measured.

    Examples
    --------
    >>> import numpy as np
    >>> from gcx.diagnostics import energy_removed
    >>> report = energy_removed([{"weight": np.array([[3.0, 1.0]]), "bias": np.zeros(1)}])
    >>> report.rows[0].share.removed
    0.8
    >>> report.to_dict()["parameters"]["bias"]
    {'shape': [1], 'layout': None, 'reason': 'fan-in 1: subtracting its mean would freeze it', \
'share': None}
    """

    rows: tuple[EnergyRow, ...]
    total: Share | None
    batches: int

    def to_dict(self) -> dict[str, Any]:
        """Give plain Python values, for JSON.

        Returns
        -------
        dict
            ``{"batches": int, "total": share, "parameters": {name: {"shape": [...], "layout": str
            or None, "reason": str, "share": share}}}``, where a share is ``{"removed": float,
            "lowest": float, "highest": float, "by_chance": float}`` or None.
        """
        return {
            "batches": self.batches,
            "total": _plain(self.total),
            "parameters": {row.name: _plain_row(row) for row in self.rows},
        }

    def bar_chart(self) -> Figure:
        """Draw a bar for each weight that has a share.

        Returns
        -------
        matplotlib.figure.Figure
            With its method ``savefig`` it is written to a file.

        Raises
        ------
        ImportError
            If matplotlib is not installed: ``pip install matplotlib``.
        ValueError
            If no parameter has a share; the table says why.
        """
        drawn = [(row.name, row.share) for row in self.rows if row.share is not None]
        if not drawn:
            msg = f"there is no share to draw:\n{self}"
            raise ValueError(msg)
        try:
            from gcx.diagnostics import _chart
        except ImportError as error:
            msg = f"bar_chart needs matplotlib ({error}): pip install matplotlib"
            raise ImportError(msg) from error
        return _chart.drawn(drawn, title=f"Gradient Centralization, {self._batches()}")

    def __str__(self) -> str:
        lines = aligned([_HEADER, *self._cells()], to_the_right=_NUMBERS)
        return "\n".join([*lines, self._counts()])

    def _repr_html_(self) -> str:
        return f"{html_table(_HEADER, self._cells())}<p>{escape(self._counts())}</p>"

    def _cells(self) -> list[tuple[str, ...]]:
        return [*map(_cells, self.rows), _cells_of_all(self.total)]

    def _counts(self) -> str:
        centralized = sum(row.layout is not None for row in self.rows)
        return f"{centralized} of {len(self.rows)} parameters centralized, {self._batches()}"

    def _batches(self) -> str:
        return "1 batch" if self.batches == 1 else f"{self.batches} batches"


def report_of(plan: Iterable[PlanRow], batches: Sequence[Mapping[str, Energy]]) -> EnergyReport:
    """Join the rows of a plan with what was measured: for each batch, energies by name.

    Raises a ValueError if there are no batches, or no gradients in them.
    """
    if not batches:
        msg = "batches is empty; if it is an iterator, it may have been gone through before"
        raise ValueError(msg)
    if not any(batches):
        msg = "no parameter has a gradient in any batch: the loss does not depend on them"
        raise ValueError(msg)
    plan = list(plan)
    of_rows = [[batch[row.name] for batch in batches if row.name in batch] for row in plan]
    rows = map(_row, plan, of_rows)
    total = _share([_sum(batch.values()) for batch in batches], _chance_of_all(plan, of_rows))
    return EnergyReport(tuple(rows), total, len(batches))


def _row(row: PlanRow, energies: Sequence[Energy]) -> EnergyRow:
    share, obstacle = None, _not_finite(energies)
    if row.layout is not None:
        share = _share(energies, _by_chance(row))
        if share is None and not obstacle:
            obstacle = "zero gradient" if energies else "no gradient"
    reason = f"{row.reason}; {obstacle}" if obstacle else row.reason
    return EnergyRow(row.name, row.shape, row.layout, reason, share)


def _share(energies: Sequence[Energy], by_chance: float) -> Share | None:
    removed, total = _sum(energies)
    if not 0.0 < total < inf:  # which a NaN is not, either
        return None
    of_batches = [energy.removed / energy.total for energy in energies if energy.total]
    return Share(removed / total, min(of_batches), max(of_batches), by_chance)


def _sum(energies: Iterable[Energy]) -> Energy:
    energies = list(energies)
    return Energy(sum(e.removed for e in energies), sum(e.total for e in energies))


def _not_finite(energies: Sequence[Energy]) -> str:
    """Tell that a gradient is not finite; empty text if all are."""
    count = sum(not isfinite(energy.total) for energy in energies)
    return f"NaN or infinity in the gradient of {count} of {len(energies)} batches" if count else ""


def _by_chance(row: PlanRow) -> float:
    """Share to be expected of independent elements with mean zero."""
    return 0.0 if row.layout is None else 1 / fan_in_size(row)


def _chance_of_all(plan: Sequence[PlanRow], of_rows: Sequence[Sequence[Energy]]) -> float:
    """Average the shares to be expected, each weighted by the energy of the gradient."""
    totals = [_sum(energies).total for energies in of_rows]
    expected = [total * _by_chance(row) for row, total in zip(plan, totals, strict=True)]
    return sum(expected) / (sum(totals) or 1.0)


def _plain(share: Share | None) -> dict[str, float] | None:
    return None if share is None else share._asdict()


def _plain_row(row: EnergyRow) -> dict[str, Any]:
    return {
        "shape": list(row.shape),
        "layout": None if row.layout is None else str(row.layout),
        "reason": row.reason,
        "share": _plain(row.share),
    }


_HEADER = ("parameter", "shape", "layout", "removed", "in batches", "by chance", "reason")
_NUMBERS = (3, 4, 5)  # the columns of them


def _cells(row: EnergyRow) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) or "scalar"
    layout = "-" if row.layout is None else str(row.layout)
    return row.name, shape, layout, *_share_cells(row.share), row.reason


def _cells_of_all(total: Share | None) -> tuple[str, ...]:
    reason = "zero or not finite" if total is None else ""
    return "whole gradient", "", "", *_share_cells(total), reason


def _share_cells(share: Share | None) -> tuple[str, str, str]:
    if share is None:
        return "-", "-", "-"
    spread = f"{_percent(share.lowest)} to {_percent(share.highest)}"
    return _percent(share.removed), spread, _percent(share.by_chance)


def _percent(share: float) -> str:
    return "<0.001%" if 0 < share < 1e-5 else f"{100 * share:.3g}%"
