"""A jitted step of AdamW with GC, beside one without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gcx.optax
from benchmarks.gpu.device import Gpu
from benchmarks.gpu.report import Measured, NotRunError
from benchmarks.throughput.models import MODELS, Model
from benchmarks.throughput.timing import Call, interleaved

__all__ = ["times"]

_OVER_NONE, _OVER_OPTAX = 1.20, 1.0
_STEPS = 10  # in a row, of which the last is waited for


def times(gpu: Gpu) -> Iterator[Measured]:
    """Time of a step of GPT-2, whose weights are (in, out)."""
    device = str(jax.devices()[0])
    if not device.startswith(gpu.device):
        raise NotRunError(f"the first device of JAX is {device}")
    model = MODELS["gpt2"]
    layouts = {f"w{k}": weight.layout for k, weight in enumerate(model.weights)}
    places = {
        "none": optax.identity(),
        "gcx": gcx.optax.centralize(layouts),
        "optax": optax.centralize(),
    }
    candidates = {
        name: _steps(model, optax.chain(place, optax.adamw(1e-3))) for name, place in places.items()
    }
    found = interleaved(candidates, seconds=0, rounds=5 if gpu.is_brief else 15)
    what = f"AdamW, {model.title}: GC over"
    yield Measured(f"{what} no GC", found["gcx"] / found["none"], _OVER_NONE)
    yield Measured(f"{what} optax.centralize", found["gcx"] / found["optax"], _OVER_OPTAX)


def _steps(model: Model, optimizer: Any) -> Call:
    """Take some steps, in memory that the step before gave back."""
    shapes = {f"w{k}": weight.shape for k, weight in enumerate(model.weights)}
    grads = {
        name: jax.random.normal(jax.random.key(k), shape)
        for k, (name, shape) in enumerate(shapes.items())
    }
    params = jax.tree.map(jnp.zeros_like, grads)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    wait: Any = jax.block_until_ready
    now = params, jax.jit(optimizer.init)(params)

    def take() -> None:
        nonlocal now
        for _ in range(_STEPS):
            now = jitted(*now, grads)
        wait(now)

    return take
