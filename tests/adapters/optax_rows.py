"""gcx.optax under the contract: its place in the chain stands for `where`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gcx.optax

from adapter import ADAM_RATE, MOMENTUM, RATE, Adapter, Arrays, Kind, start
from optim_rows import Optim, layouts_with

jax.config.update("jax_enable_x64", True)  # as tests/libraries.py does


class Optax(Optim):
    name = "optax"
    of_bias = "as given"
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

    __reduce_ex__ = Adapter.__reduce_ex__

    def __init__(self, kind: Kind, folder: Path, dtype: str | None = None) -> None:
        sgd, adam = optax.sgd(RATE, momentum=MOMENTUM), optax.adam(ADAM_RATE)
        self.kind, self.plain = kind, sgd if kind == "sgd" else adam
        self.params = jax.tree.map(jnp.asarray, start(dtype or self.dtype))
        self._chain(self.plain)

    def _chain(self, optimizer: Any) -> None:
        self.optimizer, self.update = optimizer, jax.jit(optimizer.update)
        self.state = optimizer.init(self.params)

    def attach(self, where: str = "gradient", overrides: Any = None, **options: Any) -> None:
        if self.optimizer is not self.plain:
            raise NotImplementedError
        self.layouts = layouts_with(overrides)
        transformation = gcx.optax.centralize(self.layouts, **options)
        chains = {"gradient": (transformation, self.plain), "update": (self.plain, transformation)}
        self._chain(optax.chain(*chains[where]))

    def step(self, gradients: Arrays) -> None:
        found = {n: gradients.get(n, np.zeros_like(p)) for n, p in self.params.items()}
        updates, self.state = self.update(found, self.state, self.params)
        self.params = optax.apply_updates(self.params, updates)

    def resumed(self) -> Optax:
        other = type(self)(self.kind, Path())
        other._chain(self.optimizer)
        other.params, other.state = jax.tree.map(np.asarray, (self.params, self.state))
        return other

    def plan(self) -> Any:
        return gcx.optax.plan(self.params, self.layouts)


ROWS = [Optax]
