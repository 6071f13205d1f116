"""CuPy: in place, by the clock of the GPU, with a cold cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import cupy as cp
import numpy as np

import gcx
from benchmarks.throughput.models import Weight
from benchmarks.throughput.timing import DeviceClock, host_clock
from benchmarks.throughput.workload import CACHES, COPY, EXPRESSION, GCX, Workload
from gcx.backends import _cupy

__all__ = ["device_name", "free_bytes", "release", "workload"]


def workload(weights: Sequence[Weight], dtype: str, device: str, /) -> Workload:
    """See `benchmarks.throughput.workload.Library`."""
    here = _current(device)
    # A million random numbers over and over, since CuPy may be installed without cuRAND.
    numbers = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    block = _cupy.asarray(numbers, dtype, device)
    grads = [cp.resize(block, weight.shape) for weight in weights]
    layouts = [weight.layout for weight in weights]
    source = cp.concatenate([grad.ravel() for grad in grads])
    target = cp.empty_like(source)

    def expression() -> list[Any]:
        for grad, weight in zip(grads, weights, strict=True):
            _subtract_mean(grad, weight.axes)
        return grads

    calls = {
        COPY: lambda: cp.copyto(target, source),
        GCX: lambda: gcx.centralize_many(grads, layouts=layouts, out=grads),
        EXPRESSION: expression,
    }
    return Workload(
        calls, 2 * source.nbytes, _clock(here), host_clock(lambda _: here.synchronize())
    )


def _subtract_mean(grad: Any, axes: tuple[int, ...]) -> None:
    grad -= grad.mean(axes, keepdims=True)


def free_bytes(device: str, /) -> int:
    """See `benchmarks.throughput.workload.Library`."""
    free: int = _current(device).mem_info[0]
    return free


def release() -> None:
    """See `benchmarks.throughput.workload.Library`."""
    cp.get_default_memory_pool().free_all_blocks()


def device_name(device: str, /) -> str:
    """See `benchmarks.throughput.workload.Library`."""
    name: bytes = cp.cuda.runtime.getDeviceProperties(_current(device).id)["name"]
    return name.decode()


def _current(device: str) -> Any:
    """Make a device the current one."""
    found = cp.cuda.Device(int(device.removeprefix("cuda:")))
    found.use()
    return found


def _clock(device: Any) -> DeviceClock:
    other = cp.empty(CACHES * device.attributes["L2CacheSize"], cp.int8)
    return DeviceClock(partial(other.fill, 0), cp.cuda.Event, cp.cuda.get_elapsed_time)
