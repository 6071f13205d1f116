"""A small residual network in JAX, its weights in a nested dict with the names of Flax.

Convolutions are patches times a matrix: for images of this size, that and its derivative take a
tenth of the time of XLA's convolution on a CPU. Inside, arrays are (channels, height, width, n), so
that all copies and sums go through long rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["CLASSES", "Network", "Statistics", "Weights", "he_normal"]

CLASSES = 10
GROUPS = 4
EPSILON = 1e-5
RUNNING = 0.1  # share of the newest batch in the running statistics, as in torch

Weights = dict[str, Any]
Statistics = dict[str, Any]  # running mean and variance of each batch norm, by its name


@dataclass(frozen=True)
class Network:
    """Stem, two stages of residual blocks (the second halves the image), mean, dense head.

    Parameters
    ----------
    norm : str
        After each convolution: ``"batch norm"``, ``"group norm"`` or ``"no norm"``.
    blocks : int
        In each stage.
    width : int
        Channels of the first stage; the second has twice as many.
    inputs, classes : int
        Channels of the images, and outputs.
    stem_stride : int
        By how much the stem makes the image smaller; its kernel is 3 wide, or one more than that.
    """

    norm: str
    blocks: int = 1
    width: int = 16
    inputs: int = 1
    classes: int = CLASSES
    stem_stride: int = 1

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.norm if self.blocks == 1 else f"{self.norm}, {self.blocks} blocks a stage"

    def start(self, seed: int) -> tuple[Weights, Statistics]:
        """Draw initial weights, He normal, in NumPy: the same for every library."""
        rng = np.random.default_rng((seed, 0))
        stem = max(3, self.stem_stride + 1)
        weights: Weights = {"stem": _convolution(rng, self.inputs, self.width, stem)}
        last = self.width
        for name, channels in self._stages():
            block = {
                "first": _convolution(rng, last, channels),
                "second": _convolution(rng, channels, channels),
            }
            if last != channels:
                block["shortcut"] = _convolution(rng, last, channels, size=1)
            weights[name], last = block, channels
        weights["head"] = {
            "kernel": he_normal(rng, (last, self.classes)),
            "bias": np.zeros(self.classes, np.float32),
        }
        return weights, self._statistics(weights)

    def _stages(self) -> list[tuple[str, int]]:
        """Name and channels of each block."""
        return [
            (f"stage{stage}_block{block}", self.width * (stage + 1))
            for stage in range(2)
            for block in range(self.blocks)
        ]

    def _statistics(self, weights: Weights) -> Statistics:
        """Of each convolution, where they are kept: none but batch norm has any."""
        if self.norm != "batch norm":
            return {}
        found: Statistics = {}
        for name, layer in _convolutions(weights):
            channels = len(layer["scale"])
            found[name] = (np.zeros(channels, np.float32), np.ones(channels, np.float32))
        return found

    def __call__(
        self, weights: Weights, statistics: Statistics, x: Any, *, training: bool
    ) -> tuple[Any, Statistics]:
        """Return logits (n, classes), and the running statistics after this batch."""
        return self.look(weights, statistics, x, training=training)[:2]

    def look(
        self, weights: Weights, statistics: Statistics, x: Any, *, training: bool
    ) -> tuple[Any, Statistics, list[Any]]:
        """Return as well, for each ReLU, the share above 0 in each of its channels."""
        after: Statistics = {}
        above: list[Any] = []

        def rectified(x: Any) -> Any:
            above.append((x > 0).mean((1, 2, 3)))
            return jax.nn.relu(x)

        def convolved(name: str, layer: Weights, x: Any, stride: int = 1) -> Any:
            y = _convolve(layer["kernel"], x, stride)
            if self.norm == "batch norm":
                y, after[name] = _batch_norm(y, statistics[name], training=training)
            elif self.norm == "group norm":
                y = _group_norm(y)
            return y * _by_channel(layer["scale"]) + _by_channel(layer["bias"])

        x = jnp.asarray(x).transpose(3, 1, 2, 0)
        x = rectified(convolved("stem", weights["stem"], x, self.stem_stride))
        for name, _ in self._stages():
            block = weights[name]
            stride = 2 if "shortcut" in block else 1
            y = rectified(convolved(f"{name}/first", block["first"], x, stride))
            y = convolved(f"{name}/second", block["second"], y)
            if "shortcut" in block:
                x = convolved(f"{name}/shortcut", block["shortcut"], x, stride)
            x = rectified(x + y)
        head = weights["head"]
        return x.mean((1, 2)).T @ head["kernel"] + head["bias"], after, above


def _convolution(rng: np.random.Generator, last: int, channels: int, size: int = 3) -> Weights:
    return {
        "kernel": he_normal(rng, (size, size, last, channels)),
        "scale": np.ones(channels, np.float32),
        "bias": np.zeros(channels, np.float32),
    }


def he_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Draw a kernel whose last axis is that of the outputs."""
    fan_in = np.prod(shape[:-1])
    return (rng.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)


def _convolutions(weights: Weights) -> list[tuple[str, Weights]]:
    """Of all depths, with their names."""
    found = []
    for name, value in weights.items():
        if "scale" in value:
            found.append((name, value))
        elif "kernel" not in value:
            found += [(f"{name}/{inner}", layer) for inner, layer in value.items()]
    return found


def _convolve(kernel: Any, x: Any, stride: int) -> Any:
    """Convolve with same padding, as a matrix product over all patches."""
    size, _, _, channels = kernel.shape
    _, height, width, _ = x.shape
    around = size // 2
    padded = jnp.pad(x, ((0, 0), (around, around), (around, around), (0, 0)))
    shifts = [
        padded[:, i : i + height : stride, j : j + width : stride]
        for i in range(size)
        for j in range(size)
    ]
    patches = jnp.concatenate(shifts)
    product = kernel.reshape(-1, channels).T @ patches.reshape(len(patches), -1)
    return product.reshape(channels, *shifts[0].shape[1:])


def _batch_norm(x: Any, running: Any, *, training: bool) -> tuple[Any, Any]:
    mean, variance = after = running
    if training:
        mean = x.mean((1, 2, 3))
        variance = jnp.square(x - _by_channel(mean)).mean((1, 2, 3))
        count = x.size // len(x)
        after = tuple(
            (1 - RUNNING) * old + RUNNING * new
            for old, new in zip(running, (mean, variance * count / (count - 1)), strict=True)
        )
    return (x - _by_channel(mean)) * _by_channel(jax.lax.rsqrt(variance + EPSILON)), after


def _group_norm(x: Any) -> Any:
    grouped = x.reshape(GROUPS, -1, *x.shape[1:])
    centered = grouped - grouped.mean((1, 2, 3), keepdims=True)
    variance = jnp.square(centered).mean((1, 2, 3), keepdims=True)
    return (centered * jax.lax.rsqrt(variance + EPSILON)).reshape(x.shape)


def _by_channel(vector: Any) -> Any:
    return vector[:, None, None, None]
