"""gcx.thinc under the contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from thinc import api

import gcx.thinc

from adapter import ADAM_RATE, WEIGHTS, Adapter, Arrays, Kind, start

MODELS: dict[int, Any] = {}


class Thinc(Adapter):
    name = "thinc"
    dtype = "float32"
    momentum = 0.0
    rate = 2.0
    warns_at_the_line = False
    names: ClassVar = {"hidden": "0.relu.W", "output": "1.linear.W"}
    lacks: ClassVar = {
        "layers": "thinc has no convolutions",
        "decay": "the optimizer says it: L2_is_weight_decay",
        "test_narrow_weights_warn": "its weights are of 32 bits",
        "test_a_checkpoint_goes_on": "it does not save optimizers",
        "test_copies_go_on_alike": "a copy is a plain optimizer",
    }

    def __init__(self, kind: Kind, folder: Path, dtype: str | None = None) -> None:
        if dtype is not None:
            raise NotImplementedError
        self.layers = api.Relu(nO=32, nI=64), api.Linear(nO=10, nI=32)
        self.model = api.chain(*self.layers).initialize()
        for layer, name in zip(self.layers, WEIGHTS, strict=True):
            layer.set_param("W", start("float32")[name])
            layer.set_param("b", start("float32")[f"{name}_bias"])
        sgd, adam = api.SGD(self.rate, grad_clip=0.0), api.Adam(ADAM_RATE, grad_clip=0.0)
        self.optimizer = sgd if kind == "sgd" else adam

    __reduce_ex__ = object.__reduce_ex__

    def __getstate__(self) -> Any:
        """Copy the optimizer alone, which knows the layers by number."""
        MODELS[id(self.model)] = self.layers, self.model
        return self.optimizer, id(self.model)

    def __setstate__(self, state: Any) -> None:
        self.optimizer, number = state
        self.layers, self.model = MODELS[number]

    def attach(self, **options: Any) -> None:
        self.handle = gcx.thinc.centralize(self.optimizer, self.model, **options)

    def step(self, gradients: Arrays) -> None:
        for layer, name in zip(self.layers, WEIGHTS, strict=True):
            bias = gradients.get(f"{name}_bias", 0 * gradients[name][:, 0])
            layer.set_grad("W", gradients[name].astype("float32"))
            layer.set_grad("b", bias.astype("float32"))
        self.model.finish_update(self.optimizer)

    def parameters(self) -> Arrays:
        found = {}
        for layer, name in zip(self.layers, WEIGHTS, strict=True):
            found[name] = layer.get_param("W").astype("float64")
            found[f"{name}_bias"] = layer.get_param("b").astype("float64")
        return found


ROWS = [Thinc]
