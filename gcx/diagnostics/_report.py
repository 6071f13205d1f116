"""The report: for each parameter the share of the gradient's energy that GC removes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, prod
from typing import TYPE_CHECKING, Any, NamedTuple

from gcx._frameworks import needing
from gcx.layout import Layout
from gcx.plan import Plan, PlanRow, aligned, cells, count_centralized, html_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEADER = ("parameter", "shape", "layout", "removed", "in batches", "by chance", "reason")
_NUMBERS = (3, 4, 5)  # columns of numbers


class Energy(NamedTuple):
    """The squared norm of a gradient, and the part that subtracting the means removes."""

    removed: float  # the sum of M * mean**2 over the output units; 0 if it is left alone
    total: float


class Share(NamedTuple):
    """The share of a gradient's energy that Gradient Centralization removes, from 0 to 1.

    Attributes
    ----------
    removed, lowest, highest : float
        The share in all batches, and the least and the largest in a single one.
    by_chance : float
        The expected share of independent elements of equal variance and mean zero: 1 / fan-in.

    Examples
    --------
    >>> from gcx.diagnostics import Share
    >>> Share(removed=0.5, lowest=0.25, highest=0.75, by_chance=0.125).removed
    0.5
    """

    removed: float
    lowest: float
    highest: float
    by_chance: float


class EnergyRow(NamedTuple):
    """The row of one parameter.

    Attributes
    ----------
    name, shape, layout, reason
        As in `gcx.plan.PlanRow`.
    share : Share or None
        None if the parameter is left alone, or its gradient is absent, zero or not finite; the
        reason says so.

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
    """Shares of the gradient of a model, for each parameter; prints as a table.

    Attributes
    ----------
    rows : tuple of EnergyRow
        One per parameter, including those left alone.
    total : Share or None
        As in a row, of all parameters together.
    batches : int
        The number of batches.

    Examples
    --------
    >>> import numpy as np
    >>> from gcx.diagnostics import energy_removed
    >>> report = energy_removed([{"weight": np.array([[3.0, 1.0]]), "bias": np.zeros(1)}])
    >>> report.rows[0].share.removed
    0.8
    """

    rows: tuple[EnergyRow, ...]
    total: Share | None
    batches: int

    def to_dict(self) -> dict[str, Any]:
        """Give plain Python values, for JSON.

        ``{"batches": int, "total": share, "parameters": {name: {..., "share": share}}}``, where
        ``...`` is as in `gcx.plan.Plan.to_dict`, and a share is a dict of its attributes or None.
        """
        parameters = self._plan().to_dict()
        for row in self.rows:
            parameters[row.name]["share"] = row.share and row.share._asdict()
        total = self.total and self.total._asdict()
        return {"batches": self.batches, "total": total, "parameters": parameters}

    def bar_chart(self) -> Figure:
        """Draw a bar for each weight that has a share; a ValueError if none has.

        Raises an ImportError without matplotlib.
        """
        shares = {row.name: row.share for row in self.rows if row.share is not None}
        if not shares:
            raise ValueError(f"there is no share to draw:\n{self}")
        with needing("matplotlib", "matplotlib"):
            from matplotlib.figure import Figure
            from matplotlib.ticker import PercentFormatter
        figure = Figure(figsize=(8, 1.6 + 0.3 * len(shares)), layout="constrained")
        axes = figure.subplots()  # in colours that people who are colour-blind can tell apart
        removed, lowest, highest, by_chance = zip(*shares.values(), strict=True)
        axes.barh([*shares], removed, color="#0072B2", label="all batches")
        axes.hlines([*shares], lowest, highest, color="black", label="least and most in a batch")
        label = "by chance: 1 / fan-in"
        axes.plot(by_chance, [*shares], "|", color="#D55E00", label=label, ms=12, mew=2)
        axes.invert_yaxis()
        axes.set(xlim=(0, None), xlabel="share of the gradient's energy that GC removes")
        axes.set_title(f"Gradient Centralization, {self._batches()}")
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        return figure

    def __str__(self) -> str:
        return "\n".join([*aligned(self._cells(), to_the_right=_NUMBERS), self._counts()])

    def _repr_html_(self) -> str:
        header, *rows = self._cells()
        return f"{html_table(header, rows)}<p>{self._counts()}</p>"

    def _plan(self) -> Plan:
        return Plan(PlanRow(*row[:4]) for row in self.rows)

    def _cells(self) -> list[tuple[str, ...]]:
        reason = "zero or not finite" if self.total is None else ""
        rows = [
            (*cells(plain)[:3], *_share_cells(row.share), row.reason)
            for plain, row in zip(self._plan(), self.rows, strict=True)
        ]
        return [_HEADER, *rows, ("whole gradient", "", "", *_share_cells(self.total), reason)]

    def _counts(self) -> str:
        return f"{count_centralized(self._plan())}, {self._batches()}"

    def _batches(self) -> str:
        return "1 batch" if self.batches == 1 else f"{self.batches} batches"


def _share_cells(share: Share | None) -> tuple[str, str, str]:
    if share is None:
        return "-", "-", "-"
    percent = ["<0.001%" if 0 < x < 1e-5 else f"{100 * x:.3g}%" for x in share]
    removed, lowest, highest, by_chance = percent
    return removed, f"{lowest} to {highest}", by_chance


def report_of(plan: Iterable[PlanRow], batches: Sequence[Mapping[str, Energy]]) -> EnergyReport:
    """Join the rows of a plan with the energies of each batch, by name."""
    if not batches:
        raise ValueError(
            "batches is empty; if it is an iterator, it may have been gone through before"
        )
    if not any(batches):
        raise ValueError(
            "no parameter has a gradient in any batch: the loss does not depend on them"
        )
    rows, weighted = [], 0.0
    for row in plan:
        energies = [batch[row.name] for batch in batches if row.name in batch]
        rows.append(_row(row, energies))
        weighted += _sum(energies).total * _by_chance(row)
    whole = [_sum(batch.values()) for batch in batches]
    # The expected shares, each weighted by the energy of the gradient.
    by_chance = weighted / (_sum(whole).total or 1.0)
    return EnergyReport(tuple(rows), _share(whole, by_chance), len(batches))


def _row(row: PlanRow, energies: Sequence[Energy]) -> EnergyRow:
    share = None if row.layout is None else _share(energies, _by_chance(row))
    reasons = [row.reason]
    if infinite := sum(not isfinite(energy.total) for energy in energies):
        reasons.append(f"NaN or infinity in the gradient of {infinite} of {len(energies)} batches")
    elif row.layout is not None and share is None:
        reasons.append("zero gradient" if energies else "no gradient")
    return EnergyRow(row.name, row.shape, row.layout, "; ".join(reasons), share)


def _share(energies: Sequence[Energy], by_chance: float) -> Share | None:
    removed, total = _sum(energies)
    if not 0.0 < total < inf:  # nor if it is NaN
        return None
    of_batches = [energy.removed / energy.total for energy in energies if energy.total]
    return Share(removed / total, min(of_batches), max(of_batches), by_chance)


def _sum(energies: Iterable[Energy]) -> Energy:
    return Energy(*map(sum, zip((0.0, 0.0), *energies, strict=True)))


def _by_chance(row: PlanRow) -> float:
    return 0.0 if row.layout is None else 1 / fan_in_size(row)


def fan_in_size(row: PlanRow) -> int:
    """Count the elements of one mean in a row that has a layout."""
    assert row.layout is not None
    view, axes = row.layout.split(row.shape)
    return prod(view[axis] for axis in axes)
