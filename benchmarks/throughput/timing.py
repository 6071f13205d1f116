"""Paired timing: the candidates take turns, and medians are compared."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

__all__ = [
    "Call",
    "Clock",
    "DeviceClock",
    "host_clock",
    "interleaved",
    "machine",
    "use_one_core",
    "waiting_clock",
    "wall_clock",
]

Call = Callable[[], object]
# Seconds a call takes, of so many in a row.
Clock = Callable[[Call, int], float]

_HEAD_START = 2  # of the GPU, in times of the host
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def use_one_core() -> None:
    """Keep this process on one core, in one thread; call it before a library is imported."""
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = "1"
    if hasattr(os, "sched_setaffinity"):  # XLA sizes its thread pool by this
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def machine() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def wall_clock(call: Call, repeats: int) -> float:
    """Time as people see it, for calls that are back when all is done."""
    start = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - start) / repeats


def waiting_clock(wait: Callable[[object], object]) -> Clock:
    """Time as people see it; `wait` returns when what a call gave is done."""
    return lambda call, repeats: wall_clock(lambda: wait(call()), repeats)


@dataclass(frozen=True)
class DeviceClock:
    """The clock of a GPU: time between two events on the current stream, with a cold cache.

    The cache is flushed for longer than the host takes to launch the call, so that all of it is in
    the queue when the GPU begins with it, and what counts is the GPU alone. Where there are more
    launches than the queue holds (about a thousand), it is the slower one of both.
    """

    flush: Call  # fills the cache with changed lines of something else
    event: Callable[[], Any]
    milliseconds: Callable[[Any, Any], float]

    def __call__(self, call: Call, repeats: int) -> float:
        """Median seconds of so many calls."""
        return median(self._seconds(call) for _ in range(repeats))

    def _seconds(self, call: Call) -> float:
        begin = perf_counter()
        call()
        of_host = perf_counter() - begin
        for _ in range(1 + ceil(_HEAD_START * of_host / self._of_a_flush)):
            self.flush()
        return self._between(call)

    @cached_property
    def _of_a_flush(self) -> float:
        self.flush()  # the first one is slower, and keeps the GPU busy while the next is launched
        return self._between(self.flush)

    def _between(self, call: Call) -> float:
        start, end = self.event(), self.event()
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e-3 * self.milliseconds(start, end)


def host_clock(wait: Callable[[object], object]) -> Clock:
    """Time until a call is back, on a device that has nothing else to do.

    `wait` returns when the device is done with what the call gave.
    """

    def seconds(call: Call) -> float:
        start = perf_counter()
        result = call()
        end = perf_counter()
        wait(result)
        return end - start

    return lambda call, repeats: median(seconds(call) for _ in range(repeats))


def interleaved(
    candidates: Mapping[str, Call],
    *,
    seconds: float,
    repeats: int = 1,
    rounds: int = 7,
    clock: Clock = wall_clock,
) -> dict[str, float]:
    """Median seconds a call of each candidate.

    A round calls each candidate `repeats` times in a row, and begins with another one each time,
    so that what else the machine does hits all of them alike. Rounds go on for `seconds`, and are
    at least `rounds`.
    """
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        candidates[name]()  # compiled, allocated, warm
    begin = perf_counter()
    for turn in count():
        if turn >= rounds and perf_counter() - begin > seconds:
            return {name: median(times) for name, times in samples.items()}
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]
            samples[name].append(clock(candidates[name], repeats))
    raise AssertionError  # count() does not end
