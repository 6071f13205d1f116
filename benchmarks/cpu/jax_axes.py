"""``python -m benchmarks jax-axes`` trains layers, and prints whether their means stay put."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import gcx.optax
from benchmarks.command.libraries import double_precision
from gcx.optax._names import named_leaves

STEPS = 30
KEY = jax.random.key(0)
PACKAGES = ("jax", "optax", "flax", "dm-haiku", "equinox")


class Layer(NamedTuple):
    """A layer as its parameters, a function of them, and what gcx reads off it."""

    params: Any
    apply: Callable[[Any], Any]
    layouts: dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    ArgumentParser(prog="python -m benchmarks jax-axes", description=__doc__).parse_args(arguments)
    with double_precision(["jax"]):
        print("\n".join(report()))
    return 0


def report() -> Iterator[str]:
    """Lines of the table."""
    yield ", ".join(f"{name} {version(name)}" for name in PACKAGES) + "; float64."
    yield ""
    yield "| parameter | shape | fan-in | no GC | `optax.centralize` | gcx |"
    yield "|---|---|---|---|---|---|"
    for title, (make, name) in LAYERS.items():
        layer = make()
        (row,) = (r for r in gcx.optax.plan(layer.params, layer.layouts) if r.name == name)
        axes = row.layout.fan_in_axes(len(row.shape)) if row.layout else ()
        shape = " x ".join(map(str, row.shape))
        fan_in = ", ".join(map(str, axes)) or "none: a bias"
        found = [
            _drift(layer, name, axes, centralizer)
            for centralizer in (
                optax.identity(),
                optax.centralize(),
                gcx.optax.centralize(layer.layouts),
            )
        ]
        yield f"| {title} | {shape} | {fan_in} | {' | '.join(found)} |"


def _drift(layer: Layer, name: str, axes: tuple[int, ...], centralizer: Any) -> str:
    """How much of the change of a weight is change of its fan-in means: 0 is Corollary 4.1."""
    before, after = (
        dict(named_leaves(params))[name] for params in (layer.params, _trained(layer, centralizer))
    )
    change = after - before
    if not change.any():
        return "frozen"
    if not axes:
        return "trained"
    part = jnp.abs(change.sum(axes)) / jnp.abs(change).sum(axes)
    return f"{float(part.max()):.1g}"


def _trained(layer: Layer, centralizer: optax.GradientTransformation) -> Any:
    start = jax.tree.map(lambda leaf: leaf.astype("float64"), layer.params)
    target = jax.random.normal(jax.random.key(1), layer.apply(start).shape)
    optimizer = optax.chain(centralizer, optax.sgd(0.05, momentum=0.9))

    def loss(params: Any) -> Any:
        return jnp.mean((layer.apply(params) - target) ** 2)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = start, optimizer.init(start)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params


def _of_linen(module: nn.Module, *shape: int) -> Layer:
    x = _input(*shape)
    params = module.init(KEY, x)["params"]
    return Layer(params, lambda p: module.apply({"params": p}, x), gcx.optax.layouts(module, x))


def _of_nnx(
    module: Any, *shape: int, call: Callable[[Any, Any], Any] = lambda module, x: module(x)
) -> Layer:
    x = _input(*shape)
    graph, params = nnx.split(module)
    return Layer(params, lambda p: call(nnx.merge(graph, p), x), gcx.optax.layouts(module))


def _of_equinox(module: Any, *shape: int) -> Layer:
    x = _input(*shape)
    params, static = eqx.partition(module, eqx.is_inexact_array)
    return Layer(params, lambda p: jax.vmap(eqx.combine(p, static))(x), gcx.optax.layouts(module))


def _of_haiku(kind: Callable[..., Any], *shape: int) -> Layer:
    x = _input(*shape)

    def call(x: Any) -> Any:
        return kind(name="layer")(x)

    model: Any = hk.without_apply_rng(hk.transform(call))
    return Layer(model.init(KEY, x), lambda p: model.apply(p, x), gcx.optax.layouts(model, x))


def _input(*shape: int) -> Any:
    return jax.random.uniform(jax.random.key(2), shape, "float64")


def _attention() -> Layer:
    return _of_linen(nn.MultiHeadDotProductAttention(2), 4, 5, 8)


def _conv_of_equinox() -> Layer:
    return _of_equinox(eqx.nn.Conv2d(3, 4, 3, key=KEY), 4, 3, 8, 8)


def _stack_of_nnx() -> Layer:
    """Three layers in one array, one after the other."""
    keys = jax.random.split(KEY, 3)
    stack = nnx.vmap(lambda key: nnx.Linear(6, 6, rngs=nnx.Rngs(key)))(keys)
    scan: Any = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return _of_nnx(stack, 16, 6, call=lambda layers, x: scan(x, layers))


# What makes the layer, and the name of the parameter to look at.
LAYERS: dict[str, tuple[Callable[[], Layer], str]] = {
    "linen `Dense`": (lambda: _of_linen(nn.Dense(4), 16, 6), "kernel"),
    "linen `Dense(1)`": (lambda: _of_linen(nn.Dense(1), 16, 6), "kernel"),
    "linen `Conv`": (lambda: _of_linen(nn.Conv(4, (3, 3)), 4, 8, 8, 3), "kernel"),
    "linen depthwise `Conv`": (
        lambda: _of_linen(nn.Conv(6, (3, 3), feature_group_count=3), 4, 8, 8, 3),
        "kernel",
    ),
    "linen `ConvTranspose(transpose_kernel)`": (
        lambda: _of_linen(nn.ConvTranspose(4, (3, 3), transpose_kernel=True), 4, 8, 8, 3),
        "kernel",
    ),
    "linen `DenseGeneral`": (lambda: _of_linen(nn.DenseGeneral((2, 4)), 16, 6), "kernel"),
    "linen attention, query": (_attention, "query/kernel"),
    "linen attention, out": (_attention, "out/kernel"),
    "nnx `Linear`": (lambda: _of_nnx(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), 16, 6), "kernel"),
    "nnx `Linear`, stack of 3": (_stack_of_nnx, "kernel"),
    "haiku `Linear`": (lambda: _of_haiku(partial(hk.Linear, 4), 16, 6), "layer/w"),
    "haiku `Conv2DTranspose`": (
        lambda: _of_haiku(partial(hk.Conv2DTranspose, 4, 3), 4, 8, 8, 3),
        "layer/w",
    ),
    "Equinox `Linear`": (lambda: _of_equinox(eqx.nn.Linear(6, 4, key=KEY), 16, 6), "weight"),
    "Equinox `Conv2d`": (_conv_of_equinox, "weight"),
    "Equinox `Conv2d`, bias": (_conv_of_equinox, "bias"),
}
