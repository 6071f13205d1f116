"""SGD of gcx.optim, torch and optax, where all round as NumPy does: 200 steps, the same bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gcx.optim import SGD

import canonical_order
import libraries
from same_bits import assert_same_bits, promises_bits
from test_optim import OPTIMIZERS


def draw(dtype: str) -> Any:
    """Draw a weight, then a gradient for each step."""
    return np.random.default_rng(0).normal(0.3, 1.0, (201, 4, 300)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("foreach", [False, True])
def test_sgd_of_torch(foreach: bool, dtype: str) -> None:
    """With a power of two the product with the rate is exact, however often torch rounds it."""
    torch = pytest.importorskip("torch")
    import gcx.torch

    start, *grads = draw(dtype)
    layer = torch.nn.Linear(300, 4, bias=False)
    layer.weight.data = torch.tensor(start)
    optimizer = torch.optim.SGD(layer.parameters(), 2**-4, momentum=0.9, foreach=foreach)
    gcx.torch.centralize(optimizer, layer, reproducible=True)
    for grad in grads:
        layer.weight.grad = torch.tensor(grad)
        optimizer.step()
    expected = canonical_order.sgd(start, grads, (1,), 2**-4, momentum=0.9)
    assert_same_bits(layer.weight.detach().numpy(), expected)


def test_group_that_a_closure_switches_on() -> None:
    torch = pytest.importorskip("torch")
    import gcx.torch

    start, grad, *_ = draw("float32")
    model = torch.nn.Sequential(torch.nn.Linear(300, 4, bias=False), torch.nn.Linear(4, 2))
    model[0].weight.data = torch.tensor(start)
    off = {"params": [*model[0].parameters()], "centralize": False}
    optimizer = torch.optim.SGD([off, {"params": [*model[1].parameters()]}], 2**-4)
    gcx.torch.centralize(optimizer, model, where="update", reproducible=True)

    def closure() -> None:
        optimizer.param_groups[0]["centralize"] = True
        model[0].weight.grad = torch.tensor(grad)

    optimizer.step(closure)
    moved = start - np.float32(2**-4) * grad
    before, after = (
        np.array([canonical_order.scaled_mean(unit, 1.0) for unit in weight])
        for weight in (start, moved)
    )
    assert_same_bits(model[0].weight.detach().numpy(), moved - (after - before)[:, None])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sgd_of_optax(dtype: str) -> None:
    """Outside of jax.jit, in which XLA would join a product and a sum."""
    optax = pytest.importorskip("optax")
    import gcx.optax

    jax = next(library for library in libraries.MAKERS["jax"]() if library.device == "cpu")
    gc = gcx.optax.centralize({"*": "o..."}, reproducible=True)
    optimizer = optax.chain(gc, optax.sgd(2**-4, momentum=0.9))
    start, *grads = draw(dtype)
    weight = jax.asarray(start, dtype)
    state = optimizer.init(weight)
    for grad in grads:
        updates, state = optimizer.update(jax.asarray(grad, dtype), state, weight)
        weight = optax.apply_updates(weight, updates)
    expected = canonical_order.sgd(start, grads, (1,), 2**-4, momentum=0.9)
    assert_same_bits(jax.numpy(weight), expected)


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
    start, *grads = draw(dtype)
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
