"""The training runs as one picture: loss and drift, with and without centralization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.demo.problem import BATCH, DTYPES, STEPS_PER_EPOCH
from benchmarks.demo.training import Run, Trace

__all__ = ["save"]

# Told apart by people who do not see red and green, too; keyed by whether GC is on.
_COLORS = {True: "#0072B2", False: "#D55E00"}
_DARKER = {True: "#00304D", False: "#662D00"}
_LABELS = {True: "with GC", False: "without GC"}

# The frameworks give the same curve: a broad band, a line on top of it, dots on top of both.
_STYLES: dict[str, dict[str, Any]] = {
    "numpy": {"linewidth": 8, "alpha": 0.3},
    "torch": {"linewidth": 2},
    "jax": {"linewidth": 3, "linestyle": (0, (0.1, 3)), "dash_capstyle": "round"},
}
_DRIFT_LABEL = r"$|\overline{w} - \overline{w}_{start}|$, largest of all units"
_PALETTES = {"numpy": _COLORS, "torch": _COLORS, "jax": _DARKER}


def save(traces: Mapping[Run, Trace], path: str) -> None:
    """Draw the mean over the seeds: a row of panels for each network."""
    networks = list(dict.fromkeys(run.network for run in traces))
    figure = Figure(figsize=(10, 1.4 + 3.3 * len(networks)), layout="constrained")
    panels = figure.subplots(len(networks), 2, squeeze=False)
    for network, (loss, drift) in zip(networks, panels, strict=True):
        of_network = {run: trace for run, trace in traces.items() if run.network == network}
        _draw(loss, of_network, _smooth_losses)
        _draw(drift, of_network, _positive_drift)
        name = f"{network.upper()}, {DTYPES[network]}"
        loss.set(title=f"{name}: training loss", ylabel="cross-entropy, last epoch (nats)")
        drift.set(title=f"{name}: drift of the fan-in means", ylabel=_DRIFT_LABEL)
    _add_legend(figure, traces)
    figure.savefig(path, dpi=150)


def _draw(
    axes: Axes, traces: Mapping[Run, Trace], curve: Callable[[Trace], tuple[Any, Any]]
) -> None:
    for framework in dict.fromkeys(run.framework for run in traces):
        for centralize in (True, False):
            curves = [
                curve(trace)
                for run, trace in traces.items()
                if (run.framework, run.centralize) == (framework, centralize)
            ]
            steps, values = np.mean(curves, axis=0)
            color = _PALETTES[framework][centralize]
            axes.plot(steps, values, color=color, **_STYLES[framework])
    axes.set(xlabel=f"step (batches of {BATCH})", yscale="log")
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)


def _smooth_losses(trace: Trace) -> tuple[Any, Any]:
    """Mean over the last epoch, at each step that has a full one behind it."""
    width = min(STEPS_PER_EPOCH, len(trace.losses))
    values = np.convolve(trace.losses, np.full(width, 1 / width), "valid")
    return np.arange(width, len(trace.losses) + 1), values


def _positive_drift(trace: Trace) -> tuple[Any, Any]:
    """Drift, where a logarithmic axis can show it: zero is not on it."""
    values = np.array(trace.drift)
    return np.arange(1, len(values) + 1), np.where(values > 0, values, np.nan)


def _add_legend(figure: Figure, traces: Mapping[Run, Trace]) -> None:
    sides = [Line2D([], [], color=_COLORS[k], linewidth=4, label=_LABELS[k]) for k in _LABELS]
    styles = [
        Line2D([], [], color="dimgray", label=name, **_STYLES[name])
        for name in dict.fromkeys(run.framework for run in traces)
    ]
    seeds = {run.seed for run in traces}
    figure.legend(
        handles=[*sides, *styles],
        title=f"SGD on scanned digits, mean of the runs (seeds: {len(seeds)})",
        loc="outside upper center",
        ncols=len(sides) + len(styles),
        frameon=False,
    )
