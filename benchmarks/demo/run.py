"""The demonstration from beginning to end."""

from __future__ import annotations

from benchmarks.command.requirements import check_picture
from benchmarks.demo import plot
from benchmarks.demo.report import DemoReport, summarize
from benchmarks.demo.training import find_frameworks, train_all

__all__ = ["run"]


def run(path: str, seeds: int, steps: int = 440) -> DemoReport:
    """Train in every framework that is installed here, and save the picture.

    Parameters
    ----------
    path : str
        Where to write the picture.
    seeds : int
        How often to train each network, from other weights and in another order.
    steps : int, optional
        Length of each training run.

    Raises
    ------
    CannotRunError
        If the picture could not be written there.
    """
    check_picture("--plot", path)
    frameworks, left_out = find_frameworks()
    traces = train_all(frameworks, range(seeds), steps)
    plot.save(traces, path)
    return summarize(traces, left_out, path)
