"""The rows of a report as a bar chart: speed, and time over that of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter

from benchmarks.throughput.report import Row

__all__ = ["drawn", "save"]

# Of Okabe and Ito, told apart by people who do not see red and green, too.
_COLORS = {"numpy": "#E69F00", "torch": "#0072B2", "jax": "#009E73", "cupy": "#CC79A7"}
_HATCHES = ("", "///", "...", "xxx")  # who it is that is compared with gcx
_LEGEND: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1), "fontsize": "small"}
_WIDTH = 0.8  # of all bars of a model; models are 1 apart


class _Series(NamedTuple):
    """Bars of one color and hatch: one for each model, unless it was not measured."""

    label: str
    color: str
    hatch: str
    value: Callable[[Row], float | None]
    rows: Sequence[Row]


def save(rows: Sequence[Row], path: str) -> None:
    """Draw the chart, and write it to a file."""
    drawn(rows).savefig(path, dpi=150)


def drawn(rows: Sequence[Row]) -> Figure:
    """Draw a line of panels for each kind of device and dtype."""
    groups = list(dict.fromkeys((_kind(row), row.dtype) for row in rows))
    figure = Figure(figsize=(14, 0.6 + 3.6 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 2, squeeze=False)
    for (kind, dtype), (speed, ratio) in zip(groups, panels, strict=True):
        chosen = [row for row in rows if (_kind(row), row.dtype) == (kind, dtype)]
        models = list(dict.fromkeys(row.model for row in chosen))
        _draw(speed, models, _speeds(chosen))
        _mark_copies(speed, models, _speeds(chosen))
        ratio.set_yscale("log")
        ratio.yaxis.set_major_formatter(ScalarFormatter())
        ratio.yaxis.set_minor_formatter(ScalarFormatter())
        _draw(ratio, models, _ratios(chosen), start=1)
        ratio.axhline(1, color="black", linewidth=1)
        speed.set(
            title=f"{kind}, {dtype}: speed of gcx", ylabel="GB/s read and written, more is faster"
        )
        ratio.set(
            title=f"{kind}, {dtype}: time of gcx over others",
            ylabel="time over others, below 1 gcx is faster",
        )
        for panel in (speed, ratio):
            panel.set_xlabel("model, all weight gradients")
            panel.grid(axis="y", alpha=0.3)
            panel.set_axisbelow(True)
    return figure


def _kind(row: Row) -> str:
    return "CPU" if "cpu" in row.device.lower() else "GPU"


def _speeds(rows: Sequence[Row]) -> list[_Series]:
    return [
        _Series(f"{library}, {device}", _COLORS[library], "", lambda r: r.gigabytes_per_second, own)
        for (library, device), own in _by_place(rows).items()
    ]


def _ratios(rows: Sequence[Row]) -> list[_Series]:
    series = []
    for (library, device), own in _by_place(rows).items():
        names = dict.fromkeys(name for row in own for name in row.ratios)
        for name, hatch in zip(names, _HATCHES, strict=False):
            label = f"{name}, {library}, {device}"
            series.append(_Series(label, _COLORS[library], hatch, _ratio_to(name), own))
    return series


def _ratio_to(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.ratios.get(name)


def _by_place(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    places = dict.fromkeys((row.library, row.device) for row in rows)
    return {place: [r for r in rows if (r.library, r.device) == place] for place in places}


def _draw(
    panel: Axes, models: Sequence[str], series: Sequence[_Series], *, start: float = 0
) -> None:
    for k, one in enumerate(series):
        bars = [
            (_place(models.index(row.model), k, len(series)), value)
            for row in one.rows
            if (value := one.value(row)) is not None
        ]
        panel.bar(
            [place for place, _ in bars],
            [value - start for _, value in bars],
            bottom=start,
            width=_WIDTH / len(series),
            color=one.color,
            hatch=one.hatch,
            edgecolor="white",
            label=one.label,
        )
    panel.set_xticks(range(len(models)), models)
    panel.legend(**_LEGEND)


def _place(model: int, k: int, count: int) -> float:
    return model + _WIDTH * ((k + 0.5) / count - 0.5)


def _mark_copies(panel: Axes, models: Sequence[str], series: Sequence[_Series]) -> None:
    """Draw a line over each bar where a copy by the same library would end."""
    style: dict[str, Any] = {"color": "black", "linewidth": 2}
    half = _WIDTH / len(series) / 2
    for k, one in enumerate(series):
        for row in one.rows:
            place = _place(models.index(row.model), k, len(series))
            panel.hlines(row.copy_gigabytes_per_second, place - half, place + half, **style)
    handles, _ = panel.get_legend_handles_labels()
    copy = Line2D([], [], label="speed of a copy, same library", **style)
    panel.legend(handles=[*handles, copy], **_LEGEND)
