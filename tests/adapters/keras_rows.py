"""gcx.keras under the contract, on the backend that KERAS_BACKEND asks for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when Keras is imported

import keras

import gcx.keras

from adapter import ADAM_RATE, MOMENTUM, RATE, STEPS, WEIGHTS, Adapter, Arrays, Kind, X, Y, start


class Keras(Adapter):
    name = f"keras-{keras.backend.backend()}"
    dtype = "float32"
    has_rows = False
    names: ClassVar = {name: f"net/{name}/kernel" for name in WEIGHTS}
    lacks: ClassVar = {
        "test_copies_go_on_alike": "a model is saved, not copied",
        "test_copies_are_plain_and_warn": "a model is saved, not copied",
    }

    def __init__(self, kind: Kind, folder: Path, dtype: str | None = None) -> None:
        self.folder = folder
        hidden = keras.layers.Dense(32, activation="relu", name="hidden", dtype=dtype)
        output = keras.layers.Dense(10, name="output", dtype=dtype)
        self.model = keras.Sequential([keras.Input((64,)), hidden, output], name="net")
        p = start("float32")
        hidden.set_weights([p["hidden"].T, p["hidden_bias"]])
        output.set_weights([p["output"].T, p["output_bias"]])
        sgd = keras.optimizers.SGD(RATE, momentum=MOMENTUM)
        adam = keras.optimizers.Adam(ADAM_RATE)
        self.model.compile(sgd if kind == "sgd" else adam, loss="mse")

    def attach(self, **options: Any) -> None:
        self.handle = gcx.keras.centralize(self.model.optimizer, self.model, **options)

    def remove(self) -> None:
        super().remove()
        self.model.make_train_function(force=True)

    def train(self, steps: int = STEPS) -> None:
        self.model.fit(X, Y, batch_size=len(X), epochs=steps, shuffle=False, verbose=0)

    def step(self, gradients: Arrays) -> None:
        found = [g for name in WEIGHTS for g in (gradients[name].T, 0 * gradients[name][:, 0])]
        tensors = [*map(keras.ops.convert_to_tensor, found)]
        self.model.optimizer.apply(tensors, self.model.trainable_variables)

    def parameters(self) -> Arrays:
        found = {}
        for name in WEIGHTS:
            kernel, bias = self.model.get_layer(name).get_weights()
            found |= {name: kernel.astype("float64").T, f"{name}_bias": bias.astype("float64")}
        return found

    def resumed(self) -> Keras:
        self.model.save(self.folder / "model.keras")
        other = type(self)("sgd", self.folder)
        other.model = keras.saving.load_model(self.folder / "model.keras")
        return other


ROWS = [Keras]
