"""JAX: new arrays, under jit; each call is waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import gcx
from benchmarks.throughput.models import Weight
from benchmarks.throughput.setting import free_bytes_of_host
from benchmarks.throughput.timing import Call, host_clock, waiting_clock
from benchmarks.throughput.workload import COPY, EXPRESSION, GCX, Workload
from gcx.__main__ import attempt
from gcx.backends import _jax

__all__ = ["device_name", "free_bytes", "release", "workload"]


def workload(weights: Sequence[Weight], dtype: str, device: str, /) -> Workload:
    """See `benchmarks.throughput.workload.Library`."""
    where = _device(device)
    # A million random numbers over and over, since JAX would compile a program for each shape.
    block = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    grads = [_jax.asarray(np.resize(block, w.shape), dtype, device) for w in weights]
    size = sum(grad.size for grad in grads)
    source = jax.numpy.resize(_jax.asarray(block, dtype, device), (size,))
    layouts = [weight.layout for weight in weights]

    def centralized(grads: list[Any]) -> list[Any]:
        return gcx.centralize_many(grads, layouts=layouts)

    def expression(grads: list[Any]) -> list[Any]:
        pairs = zip(grads, weights, strict=True)
        return [grad - grad.mean(weight.axes, keepdims=True) for grad, weight in pairs]

    target = jax.numpy.zeros_like(source)
    # XLA writes nothing where it could give back its input; negated, all of it has to be written.
    negated = jax.jit(lambda source, _target: -source, donate_argnums=1, keep_unused=True)

    def copy() -> Any:
        nonlocal target
        target = negated(source, target)
        return target

    def call(function: Any, argument: Any) -> Call:
        compiled = jax.jit(function)
        return lambda: compiled(argument)

    calls = {
        COPY: copy,
        GCX: call(centralized, grads),
        EXPRESSION: call(expression, grads),
        **{name: call(peer, grads) for name, peer in _peers(weights).items()},
    }
    wait = jax.block_until_ready
    of_host = None if where.platform == "cpu" else host_clock(wait)
    return Workload(calls, 2 * source.nbytes, waiting_clock(wait), of_host)


def free_bytes(device: str, /) -> int:
    """See `benchmarks.throughput.workload.Library`."""
    statistics = _device(device).memory_stats()  # of a CPU there are none
    if not statistics:
        return free_bytes_of_host()
    return int(statistics["bytes_limit"] - statistics["bytes_in_use"])


def release() -> None:
    """See `benchmarks.throughput.workload.Library`."""
    # JAX gives nothing back before the process ends.


def device_name(device: str, /) -> str:
    """See `benchmarks.throughput.workload.Library`."""
    return str(_device(device).device_kind)


def _device(name: str) -> jax.Device:
    return next(d for d in (*jax.devices(), *jax.devices("cpu")) if str(d) == name)


def _peers(weights: Sequence[Weight]) -> dict[str, Any]:
    if any(weight.layout != "o..." for weight in weights):  # it averages over the axes behind 0
        return {}
    centralize, _ = attempt(_optax_centralize)
    return {} if centralize is None else {"optax": centralize}


def _optax_centralize() -> Any:
    import optax

    return lambda grads: optax.centralize().update(grads, optax.EmptyState())[0]
