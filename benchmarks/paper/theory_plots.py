"""What the paper proves, as pictures: each compares a run with GC to the same one without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.cells import BASE
from benchmarks.paper.labels import in_common
from benchmarks.paper.style import ARM_COLORS, GRAY, MORE_COLORS, save
from benchmarks.paper.tasks import BATCH
from benchmarks.paper.theory import GAMMAS, GC, WHOLE, Experiment, Seen, response, see

__all__ = ["draw"]

ARMS = {BASE: "without GC", GC: "with GC"}
BEFORE_P, AFTER_P = ARM_COLORS[BASE], ARM_COLORS[GC]
STEP = f"step (batches of {BATCH})"
CLASS_STYLES = tuple(zip("osD^", MORE_COLORS, strict=False))

Runs = Mapping[str, Seen]


def draw(folder: Path, experiment: Experiment = WHOLE) -> list[Path]:
    """Train with GC and without, and write the pictures into the folder.

    The whole experiment takes about two minutes of one core.

    Returns
    -------
    list of Path
        Of the drift, the gradient, the curvature, and the answer to a shift.
    """
    runs = see(experiment)
    trained = in_common([experiment.cell])
    paths = []
    for name, (title, picture) in PICTURES.items():
        figure = Figure(layout="constrained")
        picture(figure, runs)
        figure.set_size_inches(3.9, 1.9 + 2.2 * len(figure.axes))
        figure.suptitle(f"{title}\n{fill(trained, 50)}", fontsize="medium")
        for axes in figure.axes:
            axes.margins(x=0.02)
            axes.grid(alpha=0.3)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        ncols = 2 if max(map(len, labels)) < 15 else 1
        figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False)
        paths.append(folder / f"theory-{name}.svg")
        save(figure, paths[-1])
    return paths


def _drift(figure: Figure, runs: Runs) -> None:
    axes = figure.subplots()
    for arm, seen in runs.items():
        steps = np.flatnonzero(seen.drift)  # zero is not on a logarithmic axis
        axes.plot(steps, seen.drift[steps], color=ARM_COLORS[arm], label=ARMS[arm])
    axes.text(
        *(0.98, 0.3, "with GC: rounding of the weights\n(float32); 0 in exact arithmetic"),
        transform=axes.transAxes,
        ha="right",
    )
    norm = r"$\|\mathbf{1}^T (w_t - w_0)\|$"
    axes.set(yscale="log", xlabel=STEP, ylabel=f"{norm}\nover all output units")


def _gradient(figure: Figure, runs: Runs) -> None:
    for axes, seen in _panels(figure, runs):
        steps = np.arange(len(seen.gradient))
        axes.plot(steps, seen.gradient, color=BEFORE_P, label=r"before: $\|g\|$")
        axes.plot(steps, seen.kept, color=AFTER_P, label=r"after: $\|P g\|$")
        axes.plot(steps, seen.removed, ":", color=GRAY, label=r"removed: $\|g - P g\|$")
        axes.set(yscale="log")
    axes.set(xlabel=STEP)
    figure.supylabel("norm over all centralized weights", fontsize="medium")


def _curvature(figure: Figure, runs: Runs) -> None:
    for axes, seen in _panels(figure, runs):
        hessian, of_gradient, in_hyperplane = np.array(seen.curvature).T
        axes.plot(seen.points, hessian, "o-", color=BEFORE_P, label=r"$\|H\|_2$, of the loss")
        axes.plot(
            seen.points,
            of_gradient,
            "s:",
            color=GRAY,
            label=r"$\|P H\|_2$, of the gradient after $P$",
        )
        axes.plot(
            seen.points,
            in_hyperplane,
            "D-",
            color=AFTER_P,
            label=r"$\|P H P\|_2$, along steps after $P$",
        )
    axes.set(xlabel=STEP, ylim=(0, None))
    figure.supylabel("largest singular value (nats per squared weight)", fontsize="medium")


def _shift(figure: Figure, runs: Runs) -> None:
    for axes, seen in _panels(figure, runs):
        before, after = seen.heads
        sums = before.sum(axis=0)
        # Chosen by the start alone, from the lowest sum to the highest.
        chosen = np.argsort(sums)[np.linspace(0, len(sums) - 1, len(CLASS_STYLES)).astype(int)]
        for digit, (marker, color) in zip(chosen, CLASS_STYLES, strict=True):
            answer = response(seen.features, after)[:, digit]
            axes.plot(GAMMAS, GAMMAS * sums[digit], "--", color=color)
            axes.plot(GAMMAS, answer, marker, color=color, label=f"class {digit}")
        line = r"$\gamma \mathbf{1}^T w_0$, in the color of its class"
        axes.plot([], [], "--", color="black", label=line)
        axes.set(xticks=GAMMAS[::2])
    axes.set(xlabel=r"$\gamma$, added to all inputs of the layer")
    figure.supylabel("change of the output (nats)", fontsize="medium")


def _panels(figure: Figure, runs: Runs) -> Iterator[tuple[Axes, Seen]]:
    """One below the other with one scale, so that they can be compared."""
    panels = figure.subplots(len(runs), sharex=True, sharey=True)
    for axes, (arm, seen) in zip(panels, runs.items(), strict=True):
        axes.set_title(f"run {ARMS[arm]}", fontsize="medium")
        yield axes, seen


# What each compares, and how it is drawn.
PICTURES: dict[str, tuple[str, Callable[[Figure, Runs], None]]] = {
    "drift": ("Sum of the weights of each output unit:\nhow far it moves", _drift),
    "gradient": ("Gradient of each batch, before $P$ and after", _gradient),
    "curvature": (
        (
            "Hessian $H$ of the training loss in all centralized\n"
            "weights: norm without $P$ and with it"
        ),
        _curvature,
    ),
    "shift": (
        (
            "Trained head: mean over the test images of\n"
            r"$w_t^T (x + \gamma \mathbf{1}) - w_t^T x$"
        ),
        _shift,
    ),
}
