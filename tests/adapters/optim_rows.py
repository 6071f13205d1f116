"""gcx.optim under the contract, on NumPy."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gcx.optim import SGD, Adam

from adapter import ADAM_RATE, MOMENTUM, RATE, Adapter, Arrays, Kind
from adapter import start as start_of


def layouts_with(overrides: Any) -> Any:
    layouts = {**(overrides or {}), "*_bias": None}
    layouts.setdefault("*", "o...")
    return layouts


class Optim(Adapter):
    name = "optim"
    projects_the_update = True
    names: ClassVar = {"hidden": "hidden", "output": "output"}
    lacks: ClassVar = {
        "decay": "its own: coupled in SGD and Adam, apart from the gradient in AdamW",
        "layers": "it knows arrays, and no layers",
        "overrides": "layouts= says it all",
        "test_attaching_twice": "where= is an option, and nothing is attached",
        "test_momentum_from_before[gradient]": "the caller holds the state",
        "test_narrow_weights_warn": "the caller chose the dtype",
        "test_copies_are_plain_and_warn": "a copy centralizes",
        "test_the_plan_names_the_weights": "layouts= is the plan",
    }

    def __init__(self, kind: Kind, folder: Path, dtype: str | None = None) -> None:
        self.kind = kind
        plain = SGD(RATE, momentum=MOMENTUM) if kind == "sgd" else Adam(ADAM_RATE)
        self.optimizer = replace(plain, where=None)
        self.params: Arrays = start_of(dtype or self.dtype)
        self.state = self.optimizer.init(self.params)

    __reduce_ex__ = object.__reduce_ex__

    def attach(self, overrides: Any = None, **options: Any) -> None:
        options = {"where": "gradient", "layouts": layouts_with(overrides), **options}
        self.optimizer = replace(self.optimizer, **options)
        self.optimizer.init(self.params)

    def remove(self) -> None:
        self.optimizer = replace(self.optimizer, where=None)

    def step(self, gradients: Arrays) -> None:
        gradients = {n: gradients.get(n, np.zeros_like(p)) for n, p in self.params.items()}
        self.params, self.state = self.optimizer.update(self.params, gradients, self.state)

    def parameters(self) -> Arrays:
        return {name: np.array(array, "float64") for name, array in self.params.items()}

    def resumed(self) -> Optim:
        other = type(self)(self.kind, Path())
        other.optimizer, other.params = self.optimizer, self.params
        other.state = deepcopy(self.state)
        return other


ROWS = [Optim]
