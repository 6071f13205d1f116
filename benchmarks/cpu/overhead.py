"""What gcx costs before it computes: import, and dispatch of a call."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from statistics import median

import numpy as np

import gcx
from benchmarks.throughput.timing import interleaved
from gcx._dispatch import backend_for

__all__ = ["dispatch_nanoseconds", "import_milliseconds", "unchanged_nanoseconds"]

_TIMED_IMPORT = """
from time import perf_counter
start = perf_counter()
import gcx
print(perf_counter() - start)
"""


def import_milliseconds(runs: int = 15) -> float:
    """Median time of ``import gcx`` in a fresh interpreter."""
    command = [sys.executable, "-c", _TIMED_IMPORT]
    runs_done = [subprocess.run(command, check=True, capture_output=True) for _ in range(runs)]
    return 1e3 * median(float(run.stdout) for run in runs_done)


def dispatch_nanoseconds() -> float:
    """Median time from an array to its backend."""
    grad = np.zeros((2, 2))
    return 1e9 * _median_seconds(lambda: backend_for(grad))


def unchanged_nanoseconds() -> float:
    """Median time of a whole call on a bias, which only passes through: all but the arithmetic."""
    bias = np.zeros(3)
    return 1e9 * _median_seconds(lambda: gcx.centralize(bias))


def _median_seconds(call: Callable[[], object]) -> float:
    return interleaved({"call": call}, seconds=0.5, repeats=1000)["call"]
