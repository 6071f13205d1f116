"""SGD of gcx.optim, torch and optax, where all round as NumPy does: 200 steps, the same bits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from gcx.optim import SGD

import canonical_order
import libraries
from same_bits import assert_same_bits, promises_bits
from test_optim import OPTIMIZERS

Arrays = dict[str, Any]

SHAPES = {"hidden": (32, 64), "hidden_bias": (32,), "output": (32, 10), "output_bias": (10,)}
# Layout and fan-in axes of each weight: one as in torch, one as in JAX, and what is left alone.
LAYOUTS = {"hidden": "o...", "hidden_bias": None, "output": "...o", "output_bias": None}
AXES = {"hidden": (1,), "output": (0,)}

# With a power of two the product with the rate is exact. Otherwise torch joins it with the sum that
# follows, in one rounding, on processors that can.
LR, MOMENTUM = 2**-4, 0.9


@cache
def drawn() -> list[Arrays]:
    """Weights, then a gradient for each step."""
    rng = np.random.default_rng(0)
    return [{name: rng.normal(0.3, 1, s) for name, s in SHAPES.items()} for _ in range(201)]


def assert_trained(found: Arrays, dtype: str) -> None:
    for name, weight in found.items():
        start, *grads = (tree[name].astype(dtype) for tree in drawn())
        expected = canonical_order.sgd(start, grads, AXES.get(name), LR, momentum=MOMENTUM)
        assert_same_bits(np.array(weight), expected)
        assert np.abs(weight - start).max() > 0.01


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("foreach", [False, True])
def test_sgd_of_torch(foreach: bool, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    import gcx.torch

    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 10))
    model.to(getattr(torch, dtype))
    weights = dict(zip(SHAPES, model.parameters(), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM, foreach=foreach)
    gcx.torch.centralize(optimizer, model, reproducible=True)

    def in_torch(name: str, array: Any) -> Any:  # which has the outputs first
        return torch.tensor(array.T if name == "output" else array, dtype=getattr(torch, dtype))

    start, *gradients = drawn()
    for name, weight in weights.items():
        weight.data = in_torch(name, start[name])
    for grads in gradients:
        for name, weight in weights.items():
            weight.grad = in_torch(name, grads[name])
        optimizer.step()
    found = {name: weight.detach().numpy() for name, weight in weights.items()}
    assert_trained({**found, "output": found["output"].T}, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sgd_of_optax(dtype: str) -> None:
    optax = pytest.importorskip("optax")
    import gcx.optax

    jax = next(library for library in libraries.MAKERS["jax"]() if library.device == "cpu")
    optimizer = optax.chain(
        gcx.optax.centralize(LAYOUTS, reproducible=True), optax.sgd(LR, momentum=MOMENTUM)
    )
    start, *gradients = drawn()
    params = {name: jax.asarray(weight, dtype) for name, weight in start.items()}
    state = optimizer.init(params)
    for grads in gradients:
        of_jax = {name: jax.asarray(grad, dtype) for name, grad in grads.items()}
        updates, state = optimizer.update(of_jax, state, params)
        params = optax.apply_updates(params, updates)
    assert_trained({name: jax.numpy(param) for name, param in params.items()}, dtype)


@pytest.mark.parametrize("place", ["gradient", "update"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if isinstance(OPTIMIZERS[name], SGD)])
def test_reproducible_steps_end_in_the_same_bits(
    xp: Any, name: str, dtype: str, place: Any
) -> None:
    """200 steps, on large fan-ins too, against a step written for NumPy alone."""
    optimizer = replace(OPTIMIZERS[name], where=place, reproducible=True)
    if not promises_bits(xp):
        with pytest.raises(TypeError, match="0: reproducible=True"):
            optimizer.init([xp.asarray(np.ones((3, 4)), dtype)])
        return
    if xp.device != "cpu":
        return
    rng = np.random.default_rng(0)
    start, *grads = rng.normal(0.3, 1.0, (201, 4, 300)).astype(dtype)
    params = [xp.asarray(start, dtype)]
    state = optimizer.init(params)
    for grad in grads:
        params, state = optimizer.update(params, [xp.asarray(grad, dtype)], state)
    own = ("layouts", "strength", "reproducible")
    options = {name: value for name, value in vars(optimizer).items() if name not in own}
    assert_same_bits(xp.numpy(params[0]), canonical_order.sgd(start, grads, (1,), **options))


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
def test_reproducible_is_refused_before_a_step(name: str) -> None:
    optimizer = replace(OPTIMIZERS[name], reproducible=True)
    params = {"good": np.ones((2, 3)), "bad": np.ones((2, 3), complex)}
    plain = replace(optimizer, reproducible=False)
    with pytest.raises(TypeError, match=r"^bad: reproducible=True.*complex128"):
        optimizer.init(params)
    with pytest.raises(TypeError, match=r"^bad: reproducible=True.*complex128"):
        optimizer.update(params, params, plain.init(params))
    layouts = {"good": "o...", "bad": None}  # which leaves nothing to be summed
    state = replace(optimizer, layouts=layouts).init(params)
    replace(optimizer, layouts=layouts).update(params, params, state)
