"""gcx.optax under the contract: its place in the chain stands for `where`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gcx.optax

from adapter import ADAM_RATE, MOMENTUM, RATE, WEIGHTS, Adapter, Arrays, Kind, start

jax.config.update("jax_enable_x64", True)  # as tests/libraries.py does


class Optax(Adapter):
    name = "optax"
    projects_the_update = True
    has_rows = False
    names: ClassVar = {name: f"{name}/kernel" for name in WEIGHTS}
    lacks: ClassVar = {
        "where": "the place in the chain says it",
        "decay": "the place in the chain says it",
        "layers": "it knows trees of arrays, and no layers",
        "overrides": "layouts= says it all",
        "test_remove": "a chain does not change",
        "test_attaching_twice": "a chain may hold it twice, which does what once does",
        "test_narrow_weights_warn": "a transformation does not know its place in the chain",
        "test_copies_are_plain_and_warn": "a chain is of functions, which nobody copies",
        "test_copies_go_on_alike": "a chain is of functions, which nobody copies",
    }

    def __init__(self, kind: Kind, folder: Path, dtype: str | None = None) -> None:
        p = start(dtype or self.dtype)
        self.kind, self.plain = kind, optax.sgd(RATE, momentum=MOMENTUM)
        if kind == "adam":
            self.plain = optax.adam(ADAM_RATE)
        self.params: Any = {
            name: {"kernel": jnp.asarray(p[name].T), "bias": jnp.asarray(p[f"{name}_bias"])}
            for name in WEIGHTS
        }
        self._chain(self.plain)

    def _chain(self, optimizer: Any) -> None:
        self.optimizer, self.update = optimizer, jax.jit(optimizer.update)
        self.state = optimizer.init(self.params)

    def attach(self, where: str = "gradient", overrides: Any = None, **options: Any) -> None:
        if self.optimizer is not self.plain:
            raise NotImplementedError
        self.layouts: Any = "flax"
        if overrides:
            self.layouts = {**overrides, "*/bias": None}
            self.layouts.setdefault("*", "...o")
        transformation = gcx.optax.centralize(self.layouts, **options)
        chains = {"gradient": (transformation, self.plain), "update": (self.plain, transformation)}
        self._chain(optax.chain(*chains[where]))

    def step(self, gradients: Arrays) -> None:
        found = {
            name: {
                "kernel": jnp.asarray(gradients[name].T),
                "bias": jnp.asarray(gradients.get(f"{name}_bias", 0 * gradients[name][:, 0])),
            }
            for name in WEIGHTS
        }
        updates, self.state = self.update(found, self.state, self.params)
        self.params = optax.apply_updates(self.params, updates)

    def parameters(self) -> Arrays:
        kernels = {n: np.array(layer["kernel"], "float64").T for n, layer in self.params.items()}
        biases = {
            f"{n}_bias": np.array(layer["bias"], "float64") for n, layer in self.params.items()
        }
        return kernels | biases

    def resumed(self) -> Optax:
        other = type(self)(self.kind, Path())
        other._chain(self.optimizer)
        leaves, tree = jax.tree.flatten((self.params, self.state))
        saved = [np.asarray(leaf) for leaf in leaves]
        other.params, other.state = jax.tree.unflatten(tree, saved)
        return other

    def plan(self) -> Any:
        return gcx.optax.plan(self.params, self.layouts)


ROWS = [Optax]
