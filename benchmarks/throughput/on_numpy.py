"""NumPy: in place, with as many threads as it takes by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import gcx
from benchmarks.throughput.models import Weight
from benchmarks.throughput.setting import free_bytes_of_host
from benchmarks.throughput.timing import machine
from benchmarks.throughput.workload import COPY, EXPRESSION, GCX, Workload
from gcx.backends import _numpy

__all__ = ["device_name", "free_bytes", "release", "workload"]


def workload(weights: Sequence[Weight], dtype: str, device: str, /) -> Workload:
    """See `benchmarks.throughput.workload.Library`."""
    rng = np.random.default_rng(0)
    grads = [_random(rng, weight.shape, dtype, device) for weight in weights]
    layouts = [weight.layout for weight in weights]
    source = np.concatenate([grad.ravel() for grad in grads])
    target = np.empty_like(source)

    def expression() -> list[Any]:
        for grad, weight in zip(grads, weights, strict=True):
            _subtract_mean(grad, weight.axes)
        return grads

    calls = {
        COPY: lambda: np.copyto(target, source),
        GCX: lambda: gcx.centralize_many(grads, layouts=layouts, out=grads),
        EXPRESSION: expression,
    }
    return Workload(calls, 2 * source.nbytes)


def _subtract_mean(grad: Any, axes: tuple[int, ...]) -> None:
    grad -= grad.mean(axes, keepdims=True)


def free_bytes(device: str, /) -> int:
    """See `benchmarks.throughput.workload.Library`."""
    del device
    return free_bytes_of_host()


def release() -> None:
    """See `benchmarks.throughput.workload.Library`."""


def device_name(device: str, /) -> str:
    """See `benchmarks.throughput.workload.Library`."""
    del device
    return machine()


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, device: str) -> Any:
    return _numpy.asarray(rng.standard_normal(shape, np.float32), dtype, device)
