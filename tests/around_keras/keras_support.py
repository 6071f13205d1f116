"""Keras on the backend that KERAS_BACKEND asks for: autodiff on it, and small models to train."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits

import gcx.keras
from gcx.testing import assert_centralized

ASKED_BACKEND = os.environ["KERAS_BACKEND"]
assert keras.backend.backend() == ASKED_BACKEND

if ASKED_BACKEND == "jax":
    import jax

    jax.config.update("jax_enable_x64", True)  # as tests/libraries.py does


def to_numpy(variable: Any) -> Any:
    return keras.ops.convert_to_numpy(variable).copy()


def derivative(output: Callable[[], Any], variable: Any) -> Any:
    """Take the gradient of a scalar, computed from layers, by one of their variables."""
    if ASKED_BACKEND == "torch":
        import torch

        (grad,) = torch.autograd.grad(output(), variable.value)
        return to_numpy(grad)

    def of_value(value: Any) -> Any:
        with keras.StatelessScope(state_mapping=[(variable, value)]):
            return output()

    return np.array(jax.grad(of_value)(variable.value))


SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam
LossScale = keras.optimizers.LossScaleOptimizer
PIXELS, DIGITS = load_digits(return_X_y=True)
IMAGES = (PIXELS[:48] / 16).reshape(-1, 8, 8, 1).astype("float32")
LABELS = DIGITS[:48]
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def small_model(**compiling: Any) -> Any:
    """A convolution, a norm and a dense layer, always with the same weights."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, name="conv"),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dense(10, name="head"),
        ],
        name="net",
    )
    if compiling:
        model.compile(loss=LOSS, **compiling)
    return model


def centralized_model(optimizer: Any, *, run_eagerly: bool = False, **options: Any) -> Any:
    model = small_model(optimizer=optimizer, run_eagerly=run_eagerly)
    gcx.keras.centralize(optimizer, model, **options)
    return model


def fit(model: Any, epochs: int = 2) -> None:
    model.fit(IMAGES, LABELS, batch_size=16, epochs=epochs, shuffle=False, verbose=0)


def kernels(model: Any) -> dict[str, Any]:
    """Kernels by the names of their layers."""
    found = [v for v in model.trainable_variables if v.name == "kernel"]
    return {v.path.split("/")[-2]: to_numpy(v) for v in found}


def assert_means_kept(model: Any, start: dict[str, Any]) -> None:
    """Corollary 4.1, which also fails if nothing was trained."""
    for path, kernel in kernels(model).items():
        assert_centralized(kernel, start=start[path], layout="...o", rtol=1e-5)


def assert_fit_keeps_the_means(model: Any, epochs: int = 2) -> None:
    start = kernels(model)
    fit(model, epochs)
    assert_means_kept(model, start)


def assert_same_weights(model: Any, other: Any) -> None:
    for mine, theirs in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(mine), to_numpy(theirs), err_msg=mine.path)


def kernel_model(inputs: int = 5, **options: Any) -> Any:
    """One kernel of size 1, to be given gradients."""
    keras.utils.set_random_seed(1)
    layer = keras.layers.Dense(3, use_bias=False, name="head", **options)
    return keras.Sequential([keras.Input((inputs,)), layer], name="net")


GRAD = np.random.default_rng(2).standard_normal((5, 3)).astype("float32")


def step(optimizer: Any, model: Any, grad: Any = GRAD) -> None:
    tensor = keras.ops.convert_to_tensor(grad)
    optimizer.apply([tensor], model.trainable_variables)
    np.testing.assert_array_equal(to_numpy(tensor), grad)  # which stays as it is
