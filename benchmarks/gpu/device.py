"""The GPU under test: how to time it, and how to record a graph on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, inf
from shutil import which
from subprocess import PIPE, Popen
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import gcx
from benchmarks.throughput import cuda
from benchmarks.throughput.models import Weight
from benchmarks.throughput.on_torch import gradients
from benchmarks.throughput.timing import Call, Clock, host_clock, interleaved, waiting_clock
from benchmarks.throughput.workload import CACHES, COPY
from gcx.backends import load

__all__ = ["COPY", "Gpu", "centralize", "in_turn", "kernels_alone"]

_STATE = ("driver_version", "clocks.sm", "clocks.max.sm")  # fields of nvidia-smi


class Gpu:
    """One CUDA device, as torch sees it.

    Parameters
    ----------
    device : str
        Its name in torch.
    is_brief : bool
        Whether to measure less of everything.
    until : float
        The end of all measurements, by `time.perf_counter`.
    """

    def __init__(
        self, device: str = "cuda:0", *, is_brief: bool = False, until: float = inf
    ) -> None:
        self.device = device
        self.is_brief = is_brief
        self.until = until
        self._clock = self.make_clock()
        size = 2 * CACHES * self.cache_bytes()
        self._source = torch.ones(size, dtype=torch.int8, device=device)
        self._target = torch.empty_like(self._source)

    def seconds_left(self) -> float:
        """Seconds until the end of all measurements; negative after it."""
        return self.until - perf_counter()

    def rotation(
        self, weights: Sequence[Weight], dtype: str, call: Callable[[list[Tensor]], object]
    ) -> list[Call]:
        """Give a call for each of some lists of gradients, too many to stay in the cache."""
        first = gradients(weights, dtype, self.device)
        count = ceil(CACHES * self.cache_bytes() / sum(grad.nbytes for grad in first))
        lists = [first, *(gradients(weights, dtype, self.device) for _ in range(count - 1))]
        return [_bound(call, grads) for grads in lists]

    def times(self, candidates: Mapping[str, Sequence[Call]]) -> dict[str, float]:
        """Seconds of each candidate on the GPU alone: replays of graphs, which take turns.

        A graph holds all calls of a candidate, one after the other; the time is for one call. A
        copy takes turns, too: `COPY` is its time for each byte that it reads or writes.
        """
        copies = [lambda: self._target.copy_(self._source)]
        everything = {**candidates, COPY: copies}
        graphs = {name: self.record(in_turn(calls)) for name, calls in everything.items()}
        rounds = 20 if self.is_brief else 50
        found = interleaved(graphs, seconds=0, rounds=rounds, clock=self._clock)
        per_call = {name: found[name] / len(calls) for name, calls in everything.items()}
        return {**per_call, COPY: per_call[COPY] / (2 * self._source.nbytes)}

    def step_times(self, steps: Mapping[str, Call]) -> dict[str, float]:
        """Seconds of each step on the GPU alone: the host is ahead of it."""
        return interleaved(steps, seconds=0, rounds=10, clock=self._clock)

    def end_to_end(self, candidates: Mapping[str, Call], steps: int = 20) -> dict[str, float]:
        """Seconds a call as people see it, who wait for the GPU after so many calls."""
        loops = {name: in_turn([call] * steps) for name, call in candidates.items()}
        clock = waiting_clock(lambda _: self.wait())
        found = interleaved(loops, seconds=0, rounds=7, clock=clock)
        return {name: seconds / steps for name, seconds in found.items()}

    def until_back(self, call: Call) -> float:
        """Seconds of the host alone."""
        call()
        self.wait()
        return host_clock(lambda _: self.wait())(call, 50)

    # All that asks for a GPU:

    def record(self, call: Call) -> Call:
        """Record the launches of a call in a graph; return a function that replays it.

        The arrays of the call must live as long as the graph.
        """
        call()  # compiled, allocated
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def state(self) -> dict[str, str]:
        """Ask nvidia-smi for the driver and the SM clock, while the GPU is busy."""
        command = which("nvidia-smi")
        if command is None:
            return {"SM clock": "unknown: nvidia-smi is not on the PATH"}
        uuid = torch.cuda.get_device_properties(self.device).uuid
        query = [command, "-i", f"GPU-{uuid}", f"--query-gpu={','.join(_STATE)}"]
        with Popen([*query, "--format=csv,noheader"], stdout=PIPE, text=True) as asked:
            while asked.poll() is None:
                self._target.copy_(self._source)
                self.wait()
            answer = asked.stdout.read().strip() if asked.stdout else ""
        if answer.count(",") != len(_STATE) - 1:
            return {"SM clock": f"unknown: {answer}"}
        driver, clock, fastest = answer.split(", ")
        return {"driver": driver, "SM clock": f"{clock} of {fastest}"}

    def profile(self, call: Call) -> cuda.Profile:
        """See `benchmarks.throughput.cuda.profiled`."""
        return cuda.profiled(call)

    def wait(self) -> None:
        """Wait until nothing is left to do."""
        torch.cuda.synchronize()

    def release(self) -> None:
        """Give memory back that is not in use."""
        torch.cuda.empty_cache()

    def cache_bytes(self) -> int:
        """Size of the last cache."""
        size: int = torch.cuda.get_device_properties(self.device).L2_cache_size
        return size

    def make_clock(self) -> Clock:
        """Make the clock of the GPU."""
        return cuda.clock(self.device)


def _bound(call: Callable[[list[Tensor]], object], grads: list[Tensor]) -> Call:
    return lambda: call(grads)


def centralize(weights: Sequence[Weight], grads: list[Tensor]) -> list[Tensor]:
    """Centralize all gradients in place."""
    layouts = [weight.layout for weight in weights]
    is_one = len({*layouts}) == 1  # which gcx knows again in the next call
    return gcx.centralize_many(grads, layouts=layouts[0] if is_one else layouts, out=grads)


@contextmanager
def kernels_alone(library: str, device: str) -> Iterator[None]:
    """Let it be an error if the library's own operations replace the kernels."""
    backend: Any = load(library)
    if reason := backend.why_no_kernels(backend.asarray([0.0], "float32", device)):
        raise RuntimeError(f"the kernels are not used: {reason}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*CUDA kernels of gcx", RuntimeWarning)
        yield


def in_turn(calls: Sequence[Call]) -> Call:
    """Make one call of several."""

    def all_of_them() -> None:
        for call in calls:
            call()

    return all_of_them
