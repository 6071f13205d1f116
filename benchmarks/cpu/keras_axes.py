"""Corollary 4.1 for the layers of Keras, as a table: ``python -m benchmarks keras-axes``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from keras import layers

import gcx.keras

STEPS, RATE = 50, 0.1


class Case(NamedTuple):
    """A layer without bias, and the shape of one input."""

    make: Callable[[], Any]
    shape: tuple[int, ...]


CASES = {
    "Dense": Case(lambda: layers.Dense(4, use_bias=False), (6,)),
    "EinsumDense `abc,cde->abde`": Case(
        lambda: layers.EinsumDense("abc,cde->abde", (5, 2, 3)), (5, 6)
    ),
    "EinsumDense `abcd,cde->abe`": Case(
        lambda: layers.EinsumDense("abcd,cde->abe", (5, 6)), (5, 2, 3)
    ),
    "Conv1D": Case(lambda: layers.Conv1D(4, 3, use_bias=False), (7, 6)),
    "Conv2D": Case(lambda: layers.Conv2D(4, 3, use_bias=False), (7, 7, 6)),
    "Conv2D, 2 groups": Case(lambda: layers.Conv2D(4, 3, groups=2, use_bias=False), (7, 7, 6)),
    "Conv2DTranspose": Case(lambda: layers.Conv2DTranspose(4, 3, use_bias=False), (7, 7, 6)),
    "DepthwiseConv2D": Case(
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False), (7, 7, 6)
    ),
    "SimpleRNN, one step": Case(
        lambda: layers.SimpleRNN(4, activation="linear", use_bias=False), (1, 6)
    ),
}

# How the kernel is centralized: not at all, by two rules of others, and by that of its layer.
WAYS: dict[str, dict[str, Any] | None] = {
    "no GC": None,
    "keep the first axis": {"*kernel": "o..."},
    "keep the last axis": {"*kernel": "...o"},
    "gcx.keras": {},
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks keras-axes", description=__doc__)
    parser.add_argument("--write", metavar="FILE", type=Path, help="write the table there too")
    options = parser.parse_args(arguments)
    table = "\n".join(report()) + "\n"
    print(table, end="")
    if options.write:
        options.write.write_text(table, encoding="utf-8")
    return 0


def report() -> Iterator[str]:
    """Lines of the table."""
    yield f"| layer | kernel | layout | {' | '.join(WAYS)} |"
    yield "|---|---|---|" + "---|" * len(WAYS)
    for name, case in CASES.items():
        row = next(iter(gcx.keras.plan(model_of(case))))
        shape = "x".join(map(str, row.shape))
        changes = " | ".join(f"{change(case, overrides):.0e}" for overrides in WAYS.values())
        yield f"| {name} | {shape} | `{row.layout}` | {changes} |"
    yield ""
    yield (
        f"Keras {keras.__version__} on {keras.backend.backend()}: {STEPS} steps of SGD "
        f"(learning rate {RATE}, momentum 0.9) on random data, float32."
    )


def change(case: Case, overrides: Any) -> float:
    """Largest change, by training, of the response of a layer to a shift of its whole input."""
    model = model_of(case)
    optimizer = keras.optimizers.SGD(RATE, momentum=0.9)
    if overrides is not None:
        gcx.keras.centralize(optimizer, model, overrides=overrides)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, *case.shape)).astype("float32")
    y = rng.standard_normal((32, *model.output_shape[1:])).astype("float32")
    start = response(model, x)
    model.compile(optimizer, loss="mse")
    model.fit(x, y, batch_size=32, epochs=STEPS, verbose=0)
    return float(np.abs(response(model, x) - start).max())


def response(model: Any, x: Any) -> Any:
    """Show what adding 1 to the input adds to an output, away from the edges."""
    shifted = keras.ops.convert_to_numpy(model(x + 1)) - keras.ops.convert_to_numpy(model(x))
    return shifted[(slice(None), *(n // 2 for n in shifted.shape[1:-1]))]


def model_of(case: Case) -> Any:
    """Give the layer as a model, always with the same weights."""
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input(case.shape), case.make()])
