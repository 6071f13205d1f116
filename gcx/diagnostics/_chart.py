"""The bar chart of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

if TYPE_CHECKING:  # the report imports this file when it is draw
    from gcx.diagnostics._report import Share

__all__ = ["draw"]

# From the palette of Okabe and Ito, which is safe for color-blind readers.
_BAR, _CHANCE = "#0072B2", "#D55E00"


def draw(shares: Sequence[tuple[str, Share]], *, title: str) -> Figure:
    """Draw a bar for each name: the share, its range over the batches, and the share by chance."""
    figure = Figure(figsize=(8, 1.6 + 0.3 * len(shares)), layout="constrained")
    axes = figure.subplots()
    names = [name for name, _ in shares]
    removed = [share.removed for _, share in shares]
    below = [
        max(0.0, share.removed - share.lowest) for _, share in shares
    ]  # rounding may make it negative
    above = [max(0.0, share.highest - share.removed) for _, share in shares]
    places = range(len(shares))
    axes.barh(places, removed, color=_BAR, label="all batches")
    axes.errorbar(
        removed, places, xerr=(below, above), fmt="none", ecolor="black", capsize=3,
        label="least and most in a batch",
    )  # fmt: skip
    axes.plot(
        [share.by_chance for _, share in shares], places, linestyle="none", color=_CHANCE,
        marker="|", markersize=12, markeredgewidth=2, label="by chance: 1 / fan-in",
    )  # fmt: skip
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_xlabel("share of the gradient's energy that GC removes")
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
