"""SGD of torch and optax, where they round as NumPy does: 200 steps end in the same bits."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

import canonical_order
import libraries
from same_bits import assert_same_bits

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
@pytest.mark.parametrize("implementation", [{"foreach": False}, {"foreach": True}], ids=str)
def test_sgd_of_torch(implementation: dict[str, bool], dtype: str) -> None:
    torch = pytest.importorskip("torch")
    import gcx.torch

    layers = torch.nn.Linear(64, 32), torch.nn.Linear(32, 10)
    model = torch.nn.Sequential(*layers).to(getattr(torch, dtype))
    weights = {
        "hidden": layers[0].weight,
        "hidden_bias": layers[0].bias,
        "output": layers[1].weight,
        "output_bias": layers[1].bias,
    }
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM, **implementation)
    gcx.torch.centralize(optimizer, model, reproducible=True)

    start, *gradients = drawn()
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(torch.from_numpy(start[name].T if name == "output" else start[name]))
    for grads in gradients:
        for name, weight in weights.items():
            grad = torch.tensor(grads[name], dtype=weight.dtype)
            weight.grad = grad.T if name == "output" else grad
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
