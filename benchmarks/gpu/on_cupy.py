"""CuPy's arrays, by CuPy's own clock and copy."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu.device import Gpu
from benchmarks.gpu.report import Measured
from benchmarks.throughput.models import DTYPES, MODELS
from benchmarks.throughput.timing import interleaved
from benchmarks.throughput.workload import COPY, GCX, load

__all__ = ["times"]

_LIMIT = 1.15


def times(gpu: Gpu) -> Iterator[Measured]:
    """Time of all gradients of a model, over that of a copy of as many bytes."""
    for model in (MODELS["vit-b16"], MODELS["gpt2"]):
        for dtype in DTYPES:
            workload = load("cupy").workload(model.weights, dtype, gpu.device)
            calls = {name: workload.calls[name] for name in (COPY, GCX)}
            found = interleaved(calls, seconds=0, rounds=20, clock=workload.clock)
            what = f"{model.title}, {dtype}: gcx over a copy"
            yield Measured(what, found[GCX] / found[COPY], _LIMIT)
