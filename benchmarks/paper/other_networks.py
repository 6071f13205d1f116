"""Networks that are not residual ones, in JAX: a transformer, a recurrent network, a perceptron."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.paper.network import CLASSES, EPSILON, Statistics, Weights, he_normal

__all__ = ["Perceptron", "Recurrent", "Transformer"]


@dataclass(frozen=True)
class Transformer:
    """Patches of an image as tokens, blocks with layer norm in front, mean, dense head."""

    width: int = 32
    heads: int = 4
    blocks: int = 2
    patch: int = 7
    name: str = "transformer"

    def start(self, seed: int) -> tuple[Weights, Statistics]:
        """Draw kernels of variance 1 over the fan-in, and positions."""
        rng = np.random.default_rng((seed, 0))
        width, pixels, tokens = self.width, self.patch**2, (28 // self.patch) ** 2
        weights: Weights = {
            "embed": _dense(rng, pixels, width),
            "position": (0.02 * rng.standard_normal((tokens, width))).astype(np.float32),
        }
        for block in range(self.blocks):
            weights[f"block{block}"] = {
                "norm1": _scale(width),
                **{name: _dense(rng, width, width) for name in ("query", "key", "value", "out")},
                "norm2": _scale(width),
                "up": _dense(rng, width, 2 * width),
                "down": _dense(rng, 2 * width, width),
            }
        weights["norm"] = _scale(width)
        weights["head"] = _dense(rng, width, CLASSES)
        return weights, {}

    def __call__(
        self, weights: Weights, statistics: Statistics, x: Any, *, training: bool
    ) -> tuple[Any, Statistics]:
        """Return logits (n, classes); there are no statistics."""
        del training
        n, across = len(x), 28 // self.patch
        x = jnp.asarray(x).reshape(n, across, self.patch, across, self.patch)
        x = x.transpose(0, 1, 3, 2, 4).reshape(n, across**2, -1)
        x = _apply(weights["embed"], x) + weights["position"]
        for index in range(self.blocks):
            block = weights[f"block{index}"]
            x = x + self._attend(block, _layer_norm(block["norm1"], x))
            inner = jax.nn.gelu(_apply(block["up"], _layer_norm(block["norm2"], x)))
            x = x + _apply(block["down"], inner)
        return _apply(weights["head"], _layer_norm(weights["norm"], x).mean(1)), statistics

    def _attend(self, block: Weights, x: Any) -> Any:
        n, tokens, width = x.shape

        def part(name: str) -> Any:
            return _apply(block[name], x).reshape(n, tokens, self.heads, -1)

        found = jax.nn.dot_product_attention(part("query"), part("key"), part("value"))
        return _apply(block["out"], found.reshape(n, tokens, width))


@dataclass(frozen=True)
class Recurrent:
    """A GRU that reads an image row by row, and a dense head on its last state."""

    width: int = 48
    name: str = "GRU"

    def start(self, seed: int) -> tuple[Weights, Statistics]:
        """Draw kernels of variance 1 over the fan-in."""
        rng = np.random.default_rng((seed, 0))
        return {
            "input": _dense(rng, 28, 3 * self.width),
            "recurrent": _dense(rng, self.width, 3 * self.width),
            "head": _dense(rng, self.width, CLASSES),
        }, {}

    def __call__(
        self, weights: Weights, statistics: Statistics, x: Any, *, training: bool
    ) -> tuple[Any, Statistics]:
        """Return logits (n, classes); there are no statistics."""
        del training

        def step(state: Any, row: Any) -> Any:
            reset, update, new = jnp.split(row, 3, -1)
            of_state = jnp.split(_apply(weights["recurrent"], state), 3, -1)
            update = jax.nn.sigmoid(update + of_state[1])
            new = jnp.tanh(new + jax.nn.sigmoid(reset + of_state[0]) * of_state[2])
            return (1 - update) * new + update * state, None

        rows = _apply(weights["input"], jnp.asarray(x)[..., 0].transpose(1, 0, 2))
        state, _ = jax.lax.scan(step, jnp.zeros((len(x), self.width)), rows)
        return _apply(weights["head"], state), statistics


@dataclass(frozen=True)
class Perceptron:
    """Two hidden layers with ReLU, and one output."""

    inputs: int = 10
    width: int = 32
    name: str = "perceptron"

    def start(self, seed: int) -> tuple[Weights, Statistics]:
        """Draw kernels, He normal."""
        rng = np.random.default_rng((seed, 0))
        sizes = (self.inputs, self.width, self.width, 1)
        return {
            f"dense{index}": _dense(rng, *pair, gain=2)
            for index, pair in enumerate(pairwise(sizes))
        }, {}

    def __call__(
        self, weights: Weights, statistics: Statistics, x: Any, *, training: bool
    ) -> tuple[Any, Statistics]:
        """Return outputs (n, 1); there are no statistics."""
        del training
        for name in ("dense0", "dense1"):
            x = jax.nn.relu(_apply(weights[name], x))
        return _apply(weights["dense2"], x), statistics


def _dense(rng: np.random.Generator, inputs: int, outputs: int, gain: float = 1) -> Weights:
    kernel = he_normal(rng, (inputs, outputs)) * np.float32(np.sqrt(gain / 2))
    return {"kernel": kernel, "bias": np.zeros(outputs, np.float32)}


def _apply(layer: Weights, x: Any) -> Any:
    return x @ layer["kernel"] + layer["bias"]


def _scale(width: int) -> Weights:
    return {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}


def _layer_norm(layer: Weights, x: Any) -> Any:
    centered = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centered).mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt(variance + EPSILON) * layer["scale"] + layer["bias"]
