"""gcx.optim with reproducible=True: 200 steps on the same gradients end in the same bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gcx.optim import SGD, Adam, AdamW

import libraries
from libraries import ArrayLibrary
from recorded_training import LAYOUTS, Arrays, gradients, start, trained
from same_bits import assert_same_bits, promises_bits

HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}


def end(xp: ArrayLibrary, optimizer: Any, dtype: str) -> Arrays:
    params = {name: xp.asarray(weight, dtype) for name, weight in start().items()}
    state = optimizer.init(params)
    for grads in gradients():
        of_library = {name: xp.asarray(grad, dtype) for name, grad in grads.items()}
        params, state = optimizer.update(params, of_library, state)
    return {name: xp.numpy(param) for name, param in params.items()}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_training_ends_in_the_same_bits(xp: ArrayLibrary, name: str, dtype: str) -> None:
    optimizer = SGD(**HYPERPARAMETERS[name], layouts=LAYOUTS, reproducible=True)
    if not promises_bits(xp):
        with pytest.raises(TypeError, match=r"hidden: reproducible=True"):
            end(xp, optimizer, dtype)
        return
    expected = trained(dtype, **HYPERPARAMETERS[name])
    for weight, found in end(xp, optimizer, dtype).items():
        assert_same_bits(found, expected[weight])
        assert np.abs(found - start()[weight]).max() > 0.01


def test_training_in_another_order_ends_elsewhere() -> None:
    """Or equal bits would say nothing of the order."""
    (numpy,) = libraries.MAKERS["numpy"]()
    found = end(numpy, SGD(0.1, momentum=0.9, layouts=LAYOUTS), "float32")
    with pytest.raises(AssertionError, match="differ"):
        assert_same_bits(found["hidden"], trained("float32", 0.1, momentum=0.9)["hidden"])


@pytest.mark.parametrize("optimizer", [SGD(0.1), Adam(), AdamW()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("place", ["gradient", "update"])
def test_every_optimizer_refuses_what_it_cannot_promise(
    xp: ArrayLibrary, optimizer: Any, place: str
) -> None:
    optimizer = replace(optimizer, where=place, reproducible=True)
    params = [xp.asarray(np.ones((3, 4)), "complex64")]
    with pytest.raises(TypeError, match="0: reproducible=True"):
        optimizer.update(params, params, optimizer.init(params))
