"""The report: the share of each gradient's energy that Gradient Centralization removes."""

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

__all__ = ["EnergyReport", "EnergyRow", "Share", "make_report"]


class Share(NamedTuple):
    """The share of a gradient's energy that Gradient Centralization removes, from 0 to 1.

    Attributes
    ----------
    removed : float
        Sum of the removed energies of all batches, divided by the sum of their energies. So each
        batch is weighted by its energy.
    lowest, highest : float
        The smallest and the largest share in one batch.
    by_chance : float
        The expected share of independent elements with mean zero and equal variance: 1 / M for a
        fan-in of M.

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
    """The effect of Gradient Centralization on the gradient of one parameter.

    Attributes
    ----------
    name : str
        As in the plan.
    shape : tuple of int
        Shape of the parameter.
    layout : Layout or None
        Layout with which its gradient is centralized; None leaves it alone.
    reason : str
        Reason from the plan; and the reason for a missing share, if there is a layout.
    share : Share or None
        None if the parameter is left alone, or if its gradient is zero, not finite or missing.

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
    """The effect of Gradient Centralization on the gradients of a model; prints as a table.

    Attributes
    ----------
    rows : tuple of EnergyRow
        One row for each parameter, also for parameters that are left alone.
    total : Share or None
        The share in the gradient of all parameters together; None if that is zero or not finite.
    batches : int
        Number of batches.

    Examples
    --------
    >>> import numpy as np
    >>> from gcx.diagnostics import energy_removed
    >>> report = energy_removed([{"weight": np.array([[3.0, 1.0]]), "bias": np.zeros(1)}])
    >>> report.rows[0].share.removed
    0.8
    >>> report.to_dict()["parameters"]["bias"]
    {'shape': [1], 'layout': None, 'reason': 'a vector has no fan-in', 'share': None}
    """

    rows: tuple[EnergyRow, ...]
    total: Share | None
    batches: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, for JSON.

        Returns
        -------
        dict
            ``{"batches": int, "total": share, "parameters": {name: {"shape": [...], "layout": str
            or None, "reason": str, "share": share}}}``, where a share is ``{"removed": float,
            "lowest": float, "highest": float, "by_chance": float}`` or None.
        """
        return {
            "batches": self.batches,
            "total": _make_plain(self.total),
            "parameters": {row.name: _make_plain_row(row) for row in self.rows},
        }

    def bar_chart(self) -> Figure:
        """Draw a bar for each weight that has a share.

        Returns
        -------
        matplotlib.figure.Figure
            Its method ``savefig`` writes it to a file.

        Raises
        ------
        ImportError
            If matplotlib is not installed: ``pip install matplotlib``.
        ValueError
            If no parameter has a share; the table says why.
        """
        shares = [(row.name, row.share) for row in self.rows if row.share is not None]
        if not shares:
            msg = f"there is no share to draw:\n{self}"
            raise ValueError(msg)
        try:
            from gcx.diagnostics import _chart
        except ImportError as error:
            msg = f"bar_chart needs matplotlib ({error}): pip install matplotlib"
            raise ImportError(msg) from error
        return _chart.draw(shares, title=f"Gradient Centralization, {self._batches()}")

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


def make_report(plan: Iterable[PlanRow], batches: Sequence[Mapping[str, Energy]]) -> EnergyReport:
    """Combine the rows of a plan with the energies of each batch, by name.

    Raises a ValueError if there are no batches, or no gradients in them.
    """
    if not batches:
        msg = "batches is empty; if it is an iterator, it may have been used up before"
        raise ValueError(msg)
    if not any(batches):
        msg = "no parameter has a gradient in any batch: the loss does not depend on them"
        raise ValueError(msg)
    plan = list(plan)
    of_rows = [[batch[row.name] for batch in batches if row.name in batch] for row in plan]
    rows = map(_make_row, plan, of_rows)
    total = _find_share(
        [_add_up(batch.values()) for batch in batches], _average_chance(plan, of_rows)
    )
    return EnergyReport(tuple(rows), total, len(batches))


def _make_row(row: PlanRow, energies: Sequence[Energy]) -> EnergyRow:
    share, obstacle = None, _find_non_finite(energies)
    if row.layout is not None:
        share = _find_share(energies, _find_chance(row))
        if share is None and not obstacle:
            obstacle = "zero gradient" if energies else "no gradient"
    reason = f"{row.reason}; {obstacle}" if obstacle else row.reason
    return EnergyRow(row.name, row.shape, row.layout, reason, share)


def _find_share(energies: Sequence[Energy], by_chance: float) -> Share | None:
    removed, total = _add_up(energies)
    if not 0.0 < total < inf:  # false for NaN as well
        return None
    of_batches = [energy.removed / energy.total for energy in energies if energy.total]
    return Share(removed / total, min(of_batches), max(of_batches), by_chance)


def _add_up(energies: Iterable[Energy]) -> Energy:
    energies = list(energies)
    return Energy(sum(e.removed for e in energies), sum(e.total for e in energies))


def _find_non_finite(energies: Sequence[Energy]) -> str:
    """Write the reason if a gradient is not finite; empty if all are finite."""
    count = sum(not isfinite(energy.total) for energy in energies)
    return f"NaN or infinity in the gradient of {count} of {len(energies)} batches" if count else ""


def _find_chance(row: PlanRow) -> float:
    """Return the expected share of independent elements with mean zero."""
    return 0.0 if row.layout is None else 1 / fan_in_size(row)


def _average_chance(plan: Sequence[PlanRow], of_rows: Sequence[Sequence[Energy]]) -> float:
    """Average the expected shares, weighted by the energies of the gradients."""
    totals = [_add_up(energies).total for energies in of_rows]
    expected = [total * _find_chance(row) for row, total in zip(plan, totals, strict=True)]
    return sum(expected) / (sum(totals) or 1.0)


def _make_plain(share: Share | None) -> dict[str, float] | None:
    return None if share is None else share._asdict()


def _make_plain_row(row: EnergyRow) -> dict[str, Any]:
    return {
        "shape": list(row.shape),
        "layout": None if row.layout is None else str(row.layout),
        "reason": row.reason,
        "share": _make_plain(row.share),
    }


_HEADER = ("parameter", "shape", "layout", "removed", "in batches", "by chance", "reason")
_NUMBERS = (3, 4, 5)  # columns to align to the right


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
