"""Measure how much of your model's gradient Gradient Centralization would remove."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import inf, isfinite, nan, prod
from typing import TYPE_CHECKING, Any, NamedTuple

from gcx import _compat
from gcx._centralize import OUTPUT_FIRST
from gcx._decisions import decide_row
from gcx._dispatch import backend_for
from gcx._frameworks import needing
from gcx._means import fan_in_mean
from gcx._names import Layouts, children, flatten, layouts_for, naming
from gcx.backends import load
from gcx.layout import Layout
from gcx.plan import LeaveAlone, Plan, PlanRow, aligned, cells, count_centralized

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EnergyReport", "Share", "energy_removed"]

_HEADER = ("parameter", "shape", "layout", "removed", "in batches", "by chance", "reason")
_NUMBERS = (3, 4, 5)  # columns of numbers
_Energy = tuple[float, float]  # what subtracting the means removes, and all
_LEFT_ALONE = LeaveAlone("left alone by layouts")


def energy_removed(grads: Iterable[Any], /, *, layouts: Layouts = OUTPUT_FIRST) -> EnergyReport:
    r"""Measure what share of the energy of gradients Gradient Centralization would remove.

    The energy of the gradient :math:`g` of an output unit with fan-in :math:`M` and mean
    :math:`\mu` is :math:`\lVert g \rVert^2`, and centralizing it removes :math:`M \mu^2`
    (Proposition 4.2). The share of a weight is the energy removed from all of its output units,
    divided by their energy. Sums are in float64 for every dtype.

    Parameters
    ----------
    grads : iterable of list, tuple or dict of arrays
        The gradients of each batch, as `gcx.centralize_many` takes them. A generator is enough:
        they are measured one batch at a time. Every process must call this with its DTensors.
    layouts : Layout, str, mapping, sequence or Plan, optional
        As in `gcx.centralize_many`. With a plan, the report keeps its reasons, and has a row for a
        gradient that is None in every batch.

    Raises
    ------
    TypeError, ValueError
        If a gradient is not a dense floating array, there is none, or batches or `layouts` differ.

    References
    ----------
    Yong et al., "Gradient Centralization", ECCV 2020. https://arxiv.org/abs/2004.01461

    Examples
    --------
    >>> import numpy as np
    >>> import gcx.diagnostics
    >>> rng = np.random.default_rng(0)
    >>> batches = [{"kernel": rng.random((50, 4)) - 0.25} for _ in range(3)]
    >>> report = gcx.diagnostics.energy_removed(batches, layouts="...o")
    >>> print(report)
    parameter       shape  layout  removed      in batches  by chance  reason
    kernel          50x4   ...o      48.8%  47.7% to 50.1%         2%  as given
    whole gradient                   48.8%  47.7% to 50.1%         2%
    1 of 1 parameters centralized, 3 batches
    >>> round(report.shares["kernel"].removed, 3)
    0.488
    """
    rows: dict[str, PlanRow] = {}
    energies: dict[str, list[_Energy]] = {}
    of_batches: list[_Energy] = []
    for tree in grads:
        if children(tree) is None:
            raise TypeError(
                "grads has a list, tuple or dict of arrays for each batch, but this is a "
                f"{type(grads).__name__} of {type(tree).__name__}; of a single batch, give [grads]"
            )
        named = flatten(tree)
        for name, grad in named:
            if grad is not None:
                with naming(name):
                    backend_for(grad).check_dtype(grad)
        batch = []
        for (name, grad), layout in zip(named, layouts_for(named, layouts, like=tree), strict=True):
            if isinstance(layouts, Plan):
                rows[name] = layouts[name]
            if grad is None:
                continue
            shape = tuple(grad.shape)
            if name not in rows:
                rows[name] = decide_row(name, shape, layout or _LEFT_ALONE, "as given")
            if rows[name].shape != shape:
                raise ValueError(f"{name} has shape {shape}, and {rows[name].shape} before")
            batch.append(_measure(grad, rows[name]))
            energies.setdefault(name, []).append(batch[-1])
        of_batches.append(_sum(batch))
    if not of_batches:
        raise ValueError("grads is empty; if it is an iterator, it may have been used up before")
    if not energies:
        raise ValueError("there is no gradient in any batch: the loss depends on no parameter")
    return _report(rows.values(), energies, of_batches)


class Share(NamedTuple):
    """A share of a gradient's energy; `gcx.diagnostics.energy_removed` returns them.

    Attributes
    ----------
    removed, lowest, highest : float
        The share in all batches, and the least and the largest in a single one.
    by_chance : float
        The expected share of independent elements of equal variance and mean zero: 1 / fan-in.
    """

    removed: float
    lowest: float
    highest: float
    by_chance: float


@dataclass(frozen=True)
class EnergyReport:
    """Shares of a gradient, as a table; `gcx.diagnostics.energy_removed` returns it.

    Attributes
    ----------
    plan : gcx.plan.Plan
        One row per parameter, including those left alone. The reason says so where a gradient is
        absent, zero or not finite.
    shares : dict
        The `Share` of each other weight, by name.
    total : Share or None
        The share of all parameters together.
    batches : int
        The number of batches.
    """

    plan: Plan
    shares: dict[str, Share]
    total: Share | None
    batches: int

    def bar_chart(self) -> Figure:
        """Draw a bar for each weight that has a share; a ValueError if none has.

        Raises an ImportError without matplotlib.
        """
        if not self.shares:
            raise ValueError(f"there is no share to draw:\n{self}")
        with needing("matplotlib", "matplotlib"):
            from matplotlib.figure import Figure
            from matplotlib.ticker import PercentFormatter
        names = [*self.shares]
        removed, lowest, highest, by_chance = zip(*self.shares.values(), strict=True)
        figure = Figure(figsize=(8, 1.6 + 0.3 * len(names)), layout="constrained")
        axes = figure.subplots()  # in colours that people who are colour-blind can tell apart
        axes.barh(names, removed, color="#0072B2", label="all batches")
        axes.hlines(names, lowest, highest, color="black", label="least and most in a batch")
        label = "by chance: 1 / fan-in"
        axes.plot(by_chance, names, "|", color="#D55E00", label=label, ms=12, mew=2)
        axes.invert_yaxis()
        axes.set(xlim=(0, None), xlabel="share of the gradient's energy that GC removes")
        axes.set_title(f"Gradient Centralization, {self._count_batches()}")
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        return figure

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [_HEADER]
        for row in self.plan:
            name, shape, layout, reason = cells(row)
            table.append((name, shape, layout, *_share_cells(self.shares.get(name)), reason))
        reason = "zero or not finite" if self.total is None else ""
        table.append(("whole gradient", "", "", *_share_cells(self.total), reason))
        counts = f"{count_centralized(self.plan)}, {self._count_batches()}"
        return "\n".join([*aligned(table, to_the_right=_NUMBERS), counts])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def _count_batches(self) -> str:
        return "1 batch" if self.batches == 1 else f"{self.batches} batches"


def _share_cells(share: Share | None) -> tuple[str, str, str]:
    if share is None:
        return "-", "-", "-"
    percent = ["<0.001%" if 0 < x < 1e-5 else f"{100 * x:.3g}%" for x in share]
    removed, lowest, highest, by_chance = percent
    return removed, f"{lowest} to {highest}", by_chance


def _measure(grad: Any, row: PlanRow) -> _Energy:
    x = _bring_to_float64(grad)
    xp = _compat.array_namespace(x)
    is_complex = "complex" in str(x.dtype)  # isdtype refuses the dtypes of ml_dtypes
    wide = xp.astype(x, xp.complex128 if is_complex else xp.float64)
    total = float(xp.sum(xp.abs(wide) ** 2))
    if row.layout is None:
        return 0.0, total
    if not isfinite(total):
        return nan, total
    means = fan_in_mean(wide, row.layout)
    return _fan_in_size(row, row.layout) * float(xp.sum(xp.abs(means) ** 2)), total


def _bring_to_float64(grad: Any) -> Any:
    """Bring a gradient to a place where it is whole, and where its library has float64."""
    if _compat.is_jax_array(grad):
        return load("jax").to_numpy(grad)  # JAX has float64 only if the whole process enables it
    if not _compat.is_torch_array(grad):
        return grad
    tensor = grad.detach()
    if hasattr(tensor, "full_tensor"):  # a DTensor: each process would sum its own part
        tensor = tensor.full_tensor()
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def _report(
    rows: Iterable[PlanRow],
    energies: Mapping[str, Sequence[_Energy]],
    of_batches: Sequence[_Energy],
) -> EnergyReport:
    plan, shares, expected = [], {}, 0.0
    for row in rows:
        own, reason = energies.get(row.name, ()), row.reason
        if infinite := sum(not isfinite(total) for _, total in own):
            reason += f"; NaN or infinity in the gradient of {infinite} of {len(own)} batches"
        if row.layout is not None:
            by_chance = 1 / _fan_in_size(row, row.layout)
            expected += by_chance * _sum(own)[1]
            if share := _share(own, by_chance):
                shares[row.name] = share
            elif not infinite:
                reason += "; zero gradient" if own else "; no gradient"
        plan.append(row._replace(reason=reason))
    by_chance = expected / (_sum(of_batches)[1] or 1.0)
    return EnergyReport(Plan(plan), shares, _share(of_batches, by_chance), len(of_batches))


def _share(energies: Sequence[_Energy], by_chance: float) -> Share | None:
    removed, total = _sum(energies)
    if not 0.0 < total < inf:  # nor if it is NaN
        return None
    shares = [removed / total for removed, total in energies if total]
    return Share(removed / total, min(shares), max(shares), by_chance)


def _sum(energies: Iterable[_Energy]) -> _Energy:
    removed, total = map(sum, zip((0.0, 0.0), *energies, strict=True))
    return removed, total


def _fan_in_size(row: PlanRow, layout: Layout) -> int:
    view, axes = layout.split(row.shape)
    return prod(view[axis] for axis in axes)
