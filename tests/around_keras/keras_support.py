"""Keras on the backend that KERAS_BACKEND asks for, and autodiff on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

ASKED_BACKEND = os.environ["KERAS_BACKEND"]

if ASKED_BACKEND == "jax":
    import jax

    jax.config.update("jax_enable_x64", True)  # as tests/libraries.py does


def to_numpy(variable: Any) -> Any:
    return keras.ops.convert_to_numpy(variable).copy()


def derivative(output: Callable[[], Any], variable: Any) -> Any:
    """Gradient of a scalar, computed from layers, by one of their variables."""
    if ASKED_BACKEND == "torch":
        import torch

        (grad,) = torch.autograd.grad(output(), variable.value)
        return to_numpy(grad)

    def of_value(value: Any) -> Any:
        with keras.StatelessScope(state_mapping=[(variable, value)]):
            return output()

    return np.array(jax.grad(of_value)(variable.value))
