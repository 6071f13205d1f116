"""JAX: `jax.grad`, `optax.sgd` and `gcx.optax.centralize`; no network library is needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gcx.optax
from benchmarks.demo.problem import Problem
from benchmarks.demo.training import LEARNING_RATE, MOMENTUM

__all__ = ["NETWORKS", "trainer"]


def trainer(problem: Problem, *, centralize: bool) -> JaxTrainer:
    """See `benchmarks.demo.training.Framework`."""
    return JaxTrainer(NETWORKS[problem.network], _optimizer(centralize), problem.weights)


class JaxTrainer:
    """A function from weights and images to logits, and an optimizer."""

    def __init__(
        self, logits: _Logits, optimizer: optax.GradientTransformation, weights: Any
    ) -> None:
        self._logits = logits
        self._step = _jitted_step(logits, optimizer)
        self._weights = jax.tree.map(jnp.asarray, weights)
        self._state = optimizer.init(self._weights)

    def step(self, images: Any, labels: Any, /) -> float:
        """See `benchmarks.demo.training.Trainer`."""
        self._weights, self._state, loss = self._step(self._weights, self._state, images, labels)
        return float(loss)

    def predict(self, images: Any, /) -> Any:
        """See `benchmarks.demo.training.Trainer`."""
        return np.asarray(self._logits(self._weights, images)).argmax(axis=1)

    def kernels(self) -> list[Any]:
        """See `benchmarks.demo.training.Trainer`."""
        return [np.asarray(layer["kernel"]) for layer in self._weights.values()]


@cache
def _optimizer(centralize: bool) -> optax.GradientTransformation:
    sgd = optax.sgd(LEARNING_RATE, MOMENTUM)
    if not centralize:
        return sgd
    return optax.chain(gcx.optax.centralize({"*/kernel": "...o", "*/bias": None}), sgd)


@cache  # compiled once for all seeds
def _jitted_step(logits: _Logits, optimizer: optax.GradientTransformation) -> Any:
    def loss_of(weights: Any, images: Any, labels: Any) -> Any:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(weights, images), labels)
        return losses.mean()

    @jax.jit
    def step(weights: Any, state: Any, images: Any, labels: Any) -> tuple[Any, Any, Any]:
        loss, grads = jax.value_and_grad(loss_of)(weights, images, labels)
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    return step


_Logits = Callable[[Any, Any], Any]


def _mlp(weights: Any, images: Any) -> Any:
    hidden = jax.nn.relu(_dense(weights["hidden"], images.reshape(len(images), -1)))
    return _dense(weights["output"], hidden)


def _cnn(weights: Any, images: Any) -> Any:
    first = jax.nn.relu(_convolution(weights["first"], images[..., None], stride=1))
    second = jax.nn.relu(_convolution(weights["second"], first, stride=2))
    return _dense(weights["output"], second.mean(axis=(1, 2)))


def _dense(layer: Any, inputs: Any) -> Any:
    return inputs @ layer["kernel"] + layer["bias"]


def _convolution(layer: Any, inputs: Any, *, stride: int) -> Any:
    outputs = jax.lax.conv_general_dilated(
        inputs,
        layer["kernel"],
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return outputs + layer["bias"]


NETWORKS = {"mlp": _mlp, "cnn": _cnn}
