"""The adapters under test: a small training in each framework, with one and the same interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from sklearn.datasets import load_digits

import reference

# The modules of tests/adapters with the rows, by the package that a run asks for.
MODULES = {
    "numpy": "optim_rows",
    "torch": "torch_rows",
    "jax": "optax_rows",
    "lightning": "lightning_rows",
    "transformers": "transformers_rows",
    "keras": "keras_rows",
    "thinc": "thinc_rows",
}

Kind = Literal["sgd", "adam"]
Arrays = dict[str, Any]

# Powers of two, so that a first step rounds in one place alone.
RATE, MOMENTUM, ADAM_RATE = 0.5, 0.875, 0.01
STEPS = 100

_PIXELS, DIGITS = (array[:512] for array in load_digits(return_X_y=True))
X, Y = _PIXELS / 16, np.eye(10)[DIGITS]
WEIGHTS = ("hidden", "output")


class Adapter(ABC):
    """A network of two layers in training, and how Gradient Centralization is attached to it.

    A row of the contract is a subclass. Arrays come and go in NumPy, and a weight has an output
    unit in each row, however the framework keeps it.
    """

    name: ClassVar[str]
    dtype: ClassVar[str] = "float64"
    rate: ClassVar[float] = RATE
    momentum: ClassVar[float] = MOMENTUM
    warns_of_momentum: ClassVar[bool] = False
    # Whether the warning of a copy names the line that copies.
    warns_at_the_line: ClassVar[bool] = True
    # Under where="update" a step projects its update, or restores the means of the new weights.
    projects_the_update: ClassVar[bool] = False
    has_rows: ClassVar[bool] = True  # for output units
    # Facts that do not hold for this adapter, by the name of a test or of one of its cases;
    # each with its reason. These tests must fail.
    lacks: ClassVar[Mapping[str, str]] = {}
    names: ClassVar[Mapping[str, str]] = {}  # of the weights in the plan
    of_bias: ClassVar[str] = "bias"  # why the plan leaves it alone
    handle: Any  # of a row that has one

    @abstractmethod
    def __init__(self, kind: Kind, folder: Path, dtype: str | None = None) -> None:
        """Make the network with the weights of `start`, and SGD or Adam without decay."""

    @abstractmethod
    def attach(self, **options: Any) -> None:
        """Centralize from the next step on."""

    def train(self, steps: int = STEPS) -> None:
        """Learn the digits."""
        for _ in range(steps):
            self.step(gradients_of(self.parameters()))

    @abstractmethod
    def step(self, gradients: Arrays) -> None:
        """Take one step with these gradients; a bias without one has a gradient of 0."""

    @abstractmethod
    def parameters(self) -> Arrays:
        """Copy all parameters to NumPy."""

    def plan(self) -> Any:
        """Show the plan, after a step."""
        return self.handle.plan

    def remove(self) -> None:
        """Go on without Gradient Centralization."""
        self.handle.remove()

    def resumed(self) -> Adapter:
        """Make another training from a checkpoint of this one."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotImplementedError

    def weights(self) -> Arrays:
        found = self.parameters()
        return {name: found[name] for name in WEIGHTS}


def chosen(config: pytest.Config) -> list[type[Adapter]]:
    """Find the rows of the packages that a run asks for by name, or else of all installed."""
    options = (config.getoption("--backends"), config.getoption("--packages"))
    asked = {name for option in options if option for name in option.split(",")}
    names = [name for name in MODULES if (name in asked if asked else find_spec(name))]
    return [row for name in names for row in import_module(MODULES[name]).ROWS]


def start(dtype: str = "float64") -> Arrays:
    rng = np.random.default_rng(0)
    shapes = {"hidden": (32, 64), "hidden_bias": (32,), "output": (10, 32), "output_bias": (10,)}
    drawn = {name: rng.normal(0.02, shape[-1] ** -0.5, shape) for name, shape in shapes.items()}
    return {name: array.astype(dtype) for name, array in drawn.items()}


def gradients_of(p: Arrays) -> Arrays:
    """Gradient of the mean square of the errors, by hand."""
    hidden = X @ p["hidden"].T + p["hidden_bias"]
    active = np.maximum(hidden, 0)
    error = 2 * (active @ p["output"].T + p["output_bias"] - Y) / Y.size
    before = (error @ p["output"]) * (hidden > 0)
    return {
        "hidden": before.T @ X,
        "hidden_bias": before.sum(0),
        "output": error.T @ active,
        "output_bias": error.sum(0),
    }


@cache
def trained_by_hand(rate: float, momentum: float, strength: float) -> Arrays:
    """Train by SGD with momentum and centralized gradients, in plain NumPy."""
    p = start()
    velocity = {name: np.zeros_like(array) for name, array in p.items()}
    for _ in range(STEPS):
        gradients = gradients_of(p)
        for name in WEIGHTS:
            means = reference.fan_in_means(gradients[name], (1,))
            gradients[name] = gradients[name] - strength * means
        velocity = {name: momentum * velocity[name] + grad for name, grad in gradients.items()}
        p = {name: array - rate * velocity[name] for name, array in p.items()}
    return p


def accuracy(p: Arrays) -> float:
    active = np.maximum(X @ p["hidden"].T + p["hidden_bias"], 0)
    return float(((active @ p["output"].T + p["output_bias"]).argmax(1) == DIGITS).mean())
