"""The gradients of one model in one library, and what is timed on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

from benchmarks.throughput.models import Weight
from benchmarks.throughput.timing import Call, Clock, wall_clock

__all__ = ["CACHES", "COPY", "EXPRESSION", "GCX", "Library", "Workload", "load"]

# The candidates that every library has; the others are its peers.
COPY, GCX, EXPRESSION = "copy", "gcx", "expression"

# What is written between two calls on a GPU, in sizes of its last cache: nothing is left there of
# the gradients, and as many changed lines wait to be written as the call will leave behind.
CACHES = 4


@dataclass(frozen=True)
class Workload:
    """Calls that take turns.

    `COPY` reads and writes `copied` bytes in all, as simply as the library can. `GCX`, `EXPRESSION`
    (``g -= g.mean(fan_in)``) and the peers centralize each gradient, and return all of them.
    """

    calls: Mapping[str, Call]
    copied: int
    clock: Clock = wall_clock
    host_clock: Clock | None = None  # until the call is back, where the device works on its own
    launches: Callable[[Call], int] | None = None


class Library(Protocol):
    """What the file of a library provides."""

    def workload(self, weights: Sequence[Weight], dtype: str, device: str, /) -> Workload:
        """Make random gradients on a device, and what is to be called on them.

        In place where arrays can be written to.
        """

    def free_bytes(self, device: str, /) -> int:
        """Memory of a device that is not in use."""

    def release(self) -> None:
        """Give memory back that is kept for new arrays, so that other libraries can have it."""

    def device_name(self, device: str, /) -> str:
        """Tell what the maker calls it."""


def load(library: str) -> Library:
    """Import the file of one of `gcx.backends.LIBRARIES`, and so the library."""
    return cast("Library", import_module(f"benchmarks.throughput.on_{library}"))
