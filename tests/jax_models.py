"""Models of Flax, Equinox and Haiku with every kind of layer, and their plans."""

from __future__ import annotations

from functools import partial
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import gcx.optax
from gcx.plan import Plan

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 3)
IMAGES = jax.ShapeDtypeStruct((2, 7, 7, 3), "float32")


def params_of(model: Any, *inputs: Any, **options: Any) -> Any:
    """Shapes of the parameters that a model makes of inputs, or those that it has."""
    if isinstance(model, nnx.Module):
        return nnx.state(model, nnx.Param)
    if not isinstance(model, (nn.Module, hk.Transformed)):
        return eqx.filter(model, eqx.is_array)
    params = jax.eval_shape(partial(model.init, **options), KEY, *inputs)
    return params["params"] if isinstance(model, nn.Module) else params


def plan_of(model: Any, *inputs: Any, **options: Any) -> Plan:
    if not inputs:
        return gcx.optax.plan(model)
    layouts = gcx.optax.layouts(model, *inputs, **options)
    return gcx.optax.plan(params_of(model, *inputs, **options), layouts)


def made(kind: Any, *sizes: int, **options: Any) -> Any:
    """Return a function that makes a layer of Haiku and calls it: Haiku wants both together."""

    def call(x: Any) -> Any:
        layer = kind(*sizes, **options)
        return layer(x)

    return call


def said(plan: Plan) -> dict[str, str]:
    """Layout, if there is one, and reason of each parameter."""
    return {
        row.name: f"{row.layout} {row.reason}" if row.layout else row.reason
        for row in plan
        if row.reason != "not an array"
    }


class Stacked(nn.Module):
    """A layer to scan over: it takes a carry."""

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return nn.Dense(x.shape[-1])(x), None


class OfLinen(nn.Module):
    @nn.compact
    def __call__(self, images: Any) -> Any:
        x = nn.Conv(4, (3, 3))(images)
        x = nn.Conv(8, (3, 3), feature_group_count=4, use_bias=False)(x)
        x = nn.ConvTranspose(6, (3, 3), use_bias=False)(x)
        x = nn.ConvTranspose(8, (3, 3), transpose_kernel=True, use_bias=False)(x)
        x = nn.LayerNorm(reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3))(x).mean((1, 2))
        x = x[:, None] + nn.Embed(7, 8)(jnp.arange(5))
        x = nn.MultiHeadDotProductAttention(2)(x)
        x = nn.DenseGeneral((2, 4))(x)
        x = nn.DenseGeneral(8, axis=(-2, -1), use_bias=False)(x)
        x, _ = nn.scan(Stacked, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(
            name="scanned"
        )(x, None)
        x = nn.Einsum((2, 8, 4), "...i,eio->...eo", use_bias=False)(x).sum(-2)
        x = nn.PReLU()(x)
        return nn.Dense(1)(x)


class OfNnx(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.up = nnx.ConvTranspose(4, 3, (3, 3), transpose_kernel=True, use_bias=False, rngs=rngs)
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, use_bias=False, rngs=rngs)
        self.adapted = nnx.LoRALinear(6, 4, lora_rank=2, use_bias=False, rngs=rngs)
        self.stack = nnx.vmap(lambda key: nnx.Linear(4, 6, rngs=nnx.Rngs(key)))(KEYS)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)


class OfEquinox(eqx.Module):
    layers: list[Any]

    def __init__(self) -> None:
        self.layers = [
            eqx.nn.Linear(6, 4, key=KEY),
            eqx.nn.Conv2d(3, 4, 3, key=KEY),
            eqx.nn.ConvTranspose2d(4, 3, 3, key=KEY),
            eqx.nn.MultiheadAttention(2, 8, key=KEY),
            eqx.nn.Embedding(7, 4, key=KEY),
            eqx.nn.LayerNorm((5, 8)),
            eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 6, key=key))(KEYS),
            eqx.nn.Linear("scalar", 4, key=KEY),
        ]
