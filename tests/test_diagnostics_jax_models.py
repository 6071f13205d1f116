"""`gcx.diagnostics.jax` with the models of Equinox and Flax."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gcx.diagnostics
from gcx import Layout
from gcx.diagnostics.jax import energy_removed

from optax_training import normal

pytestmark = pytest.mark.usefixtures("compiled_in_haste")


def test_equinox_modules_as_they_are() -> None:
    model = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    batches = [normal(k, 5, 4, dtype="float32") for k in range(2)]

    def loss(model: Any, x: Any) -> Any:
        return jnp.mean(jax.vmap(model)(x) ** 2)

    report = energy_removed(model, batches, loss, layouts=model)
    grads = [eqx.filter_grad(loss)(model, x).layers[0].weight for x in batches]
    expected = gcx.diagnostics.energy_removed([[grad] for grad in grads])
    shares = {row.name: row.share for row in report.rows if row.share}
    assert shares["layers/0/weight"] == pytest.approx(expected.rows[0].share, rel=1e-5)
    assert list(shares) == ["layers/0/weight", "layers/1/weight"]


def test_nnx_modules_by_their_state() -> None:
    rngs = nnx.Rngs(0)
    layers = (nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs))
    model = nnx.Sequential(*layers)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    before = jax.tree.map(np.array, rest)

    def loss(params: Any, x: Any) -> Any:
        return jnp.mean(nnx.merge(graph, params, rest, copy=True)(x) ** 2)

    batches = [normal(k, 5, 4, dtype="float32") for k in range(2)]
    report = energy_removed(params, batches, loss, layouts=model)
    assert [(row.name, row.layout) for row in report.rows if row.share] == [
        ("layers/0/kernel", Layout("io")),
        ("layers/2/kernel", Layout("io")),
    ]
    assert {row.name: row.reason for row in report.rows}["layers/1/scale"] == "norm"
    jax.tree.map(np.testing.assert_array_equal, rest, before)
