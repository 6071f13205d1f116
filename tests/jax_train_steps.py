"""Program: a train step with and without GC for each way to shard the weights, under `jax.jit`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import gcx.optax
from gcx import Layout

from jax_meshes import Facts, collectives, mesh, sharded, whole, write_facts
from reference import centralized

RATE = 50.0

# Shape and layout of each parameter, by its path.
PARAMETERS: dict[str, tuple[tuple[int, ...], str | None]] = {
    "up/kernel": ((16, 32), "...o"),
    "up/bias": ((32,), None),
    "down/kernel": ((32, 24), "...o"),
    "conv/kernel": ((3, 3, 8, 16), "...o"),
    "query/kernel": ((16, 4, 8), "ioo"),
    "linear/weight": ((24, 16), "o..."),
}


def mlp(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ params["up/kernel"] + params["up/bias"])
    return (jnp.tanh(hidden @ params["down/kernel"]) ** 2).mean()


def convolution(params: Any, x: Any) -> Any:
    images = x.reshape(-1, 4, 4, 8)
    names = ("NHWC", "HWIO", "NHWC")
    kernel = params["conv/kernel"]
    out = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=names)
    return (jnp.tanh(out / 8) ** 2).mean()


def query(params: Any, x: Any) -> Any:
    return (jnp.tanh(jnp.einsum("be,ehd->bhd", x, params["query/kernel"])) ** 2).mean()


def linear(params: Any, x: Any) -> Any:
    return (jnp.tanh(x @ params["linear/weight"].T) ** 2).mean()


def steps(loss: Callable[[Any, Any], Any], batch: tuple[int, ...], specs: dict[str, P]) -> Facts:
    """Compare the step with GC to the step without."""
    devices = mesh()
    params = {name: sharded(devices, spec, PARAMETERS[name][0]) for name, spec in specs.items()}
    x = sharded(devices, P("x"), batch)
    gc = gcx.optax.centralize({name: PARAMETERS[name][1] for name in params})
    plain = compiled(loss, optax.sgd(RATE), params, x)
    with_gc = compiled(loss, optax.chain(gc, optax.sgd(RATE)), params, x)
    end = with_gc(params, x)
    moved = whole(devices, displacements(params, end))
    expected = whole(devices, displacements(params, plain(params, x)))
    return {
        "added": collectives(with_gc) - collectives(plain),
        "gone": collectives(plain) - collectives(with_gc),
        "error": max(np.abs(moved[name] - projected(name, expected[name])).max() for name in end),
        "smallest move": min(np.abs(moved[name]).max() for name in end),
        "keeps sharding": all(
            end[name].sharding.is_equivalent_to(params[name].sharding, params[name].ndim)
            for name in end
        ),
    }


def compiled(
    loss: Callable[[Any, Any], Any], optimizer: optax.GradientTransformation, params: Any, x: Any
) -> Any:
    def step(params: Any, x: Any) -> Any:
        grads = jax.grad(loss)(params, x)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    return jax.jit(step).lower(params, x).compile()


def displacements(start: Any, end: Any) -> Any:
    return jax.tree.map(jnp.subtract, end, start)


def projected(name: str, displacement: Any) -> Any:
    """What GC makes of a step of SGD."""
    shape, layout = PARAMETERS[name]
    if layout is None:
        return displacement
    return centralized(displacement, Layout(layout).fan_in_axes(len(shape)))


def of_mlp(up: P, down: P) -> Callable[[], Facts]:
    specs = {"up/kernel": up, "up/bias": P(*up[1:]), "down/kernel": down}
    return partial(steps, mlp, (32, 16), specs)


def of_convolution(kernel: P) -> Callable[[], Facts]:
    return partial(steps, convolution, (32, 128), {"conv/kernel": kernel})


def of_query(kernel: P) -> Callable[[], Facts]:
    return partial(steps, query, (32, 16), {"query/kernel": kernel})


def of_linear(weight: P) -> Callable[[], Facts]:
    return partial(steps, linear, (32, 16), {"linear/weight": weight})


# Beside each case, the collectives that GC adds, by the number of their elements: the means of a
# fan-in that is split, and nothing for one that is whole.
CASES: dict[str, tuple[dict[str, int], Callable[[], Facts]]] = {
    "mlp, whole": ({}, of_mlp(P(), P())),
    "mlp, fan-out": ({}, of_mlp(P(None, "x"), P(None, "x"))),
    "mlp, fan-in": ({"all-reduce 32": 1, "all-reduce 24": 1}, of_mlp(P("x"), P("x"))),
    "mlp, tensor parallel": ({"all-reduce 24": 1}, of_mlp(P(None, "y"), P("y"))),
    "mlp, fan-in and fan-out": (
        {"all-reduce 16": 1, "all-reduce 12": 1},
        of_mlp(P("x", "y"), P("x", "y")),
    ),
    "mlp, over all devices": ({"all-reduce 32": 1}, of_mlp(P(("x", "y")), P(None, ("x", "y")))),
    "convolution, fan-out": ({}, of_convolution(P(None, None, None, "x"))),
    # On a CPU the remainder too, since this array is small.
    "convolution, fan-in": ({"all-reduce 16": 2}, of_convolution(P(None, None, "x"))),
    "query, fan-out": ({}, of_query(P(None, "x", "y"))),
    "query, fan-in": ({"all-reduce 16": 1}, of_query(P("x", "y"))),
    "linear, fan-out": ({}, of_linear(P("x"))),
    "linear, fan-in": ({"all-reduce 24": 1}, of_linear(P(None, "x"))),
}

if __name__ == "__main__":
    write_facts({name: run for name, (_, run) in CASES.items()})
