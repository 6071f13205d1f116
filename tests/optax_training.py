"""Small trees of parameters, and a jitted training loop around an optax optimizer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

jax.config.update("jax_enable_x64", True)  # as tests/libraries.py does


def normal(seed: int, *shape: int, dtype: str = "float64") -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def normal_like(seed: int, tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    new = [normal(seed + k, *leaf.shape, dtype=leaf.dtype) for k, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, new)


def struct(*shape: int, dtype: str = "float64") -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


KERNELS = {
    "Dense_0": {"kernel": normal(1, 4, 3), "bias": normal(2, 3)},
    "Dense_1": {"kernel": normal(3, 3, 2), "bias": normal(4, 2)},
}
FIRST_ONLY = {name: dict.fromkeys(layer, name == "Dense_0") for name, layer in KERNELS.items()}
SGD = optax.sgd(0.1)

LEARNING_RATE = 0.05
X, Y = np.asarray(normal(20, 6, 4)), np.asarray(normal(21, 6, 2))
START = {
    "Dense_0": {"kernel": np.asarray(normal(22, 4, 3)), "bias": np.zeros(3)},
    "Dense_1": {"kernel": np.asarray(normal(23, 3, 2)), "bias": np.zeros(2)},
}


def two_layers(params: Any) -> Any:
    first, second = params["Dense_0"], params["Dense_1"]
    hidden = jnp.tanh(X @ first["kernel"] + first["bias"])
    return jnp.sum((hidden @ second["kernel"] + second["bias"] - Y) ** 2) / 2


def train(
    optimizer: Any, loss: Any, params: Any, *, steps: int = 10, searches: bool = False
) -> tuple[Any, Any]:
    """Return the parameters and the state after training; a line search needs the loss."""

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        given = {"value": value, "grad": grads, "value_fn": loss} if searches else {}
        updates, state = optimizer.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state
