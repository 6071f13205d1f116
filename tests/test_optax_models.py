"""gcx.optax on the trees of Flax, Haiku and Equinox themselves, trained."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import gcx.optax

import reference

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

KEY = jax.random.key(0)


# --- whole models: every weight that is centralized, with its true fan-in axes --------------------


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(7, 8)(tokens)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = nn.RNN(nn.GRUCell(4))(x)
        return nn.Dense(1)(x)


class NnxModel(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.head = nnx.Sequential(nnx.Linear(8, 1, rngs=rngs))


def haiku_model(tokens: Any) -> Any:
    x = hk.Embed(7, 8)(tokens)
    x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
    x = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling())(x, x, x)
    x, _ = hk.GRU(4)(x[:, 0], jnp.zeros((2, 4)))
    return hk.nets.MLP([3, 1])(x)


class EquinoxModel(eqx.Module):
    embedding: Any
    norm: Any
    attention: Any
    cell: Any
    layers: list[Any]

    def __init__(self) -> None:
        self.embedding = eqx.nn.Embedding(7, 8, key=KEY)
        self.norm = eqx.nn.LayerNorm((5, 8))
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=KEY)
        self.cell = eqx.nn.GRUCell(8, 4, key=KEY)
        self.layers = [eqx.nn.Conv1d(1, 3, 2, key=KEY), eqx.nn.Linear(3, 1, key=KEY)]


TOKENS = jnp.zeros((2, 5), int)

MODELS: dict[str, tuple[str, Any, dict[str, tuple[int, ...]]]] = {
    "linen": (
        "flax",
        lambda: LinenModel().init(KEY, TOKENS),
        {
            "params/Dense_0/kernel": (0,),
            **{f"params/GRUCell_0/{gate}/kernel": (0,) for gate in ("hn", "hr", "hz")},
            **{f"params/GRUCell_0/{gate}/kernel": (0,) for gate in ("in", "ir", "iz")},
            "params/MultiHeadDotProductAttention_0/key/kernel": (0,),
            "params/MultiHeadDotProductAttention_0/out/kernel": (0, 1),
            "params/MultiHeadDotProductAttention_0/query/kernel": (0,),
            "params/MultiHeadDotProductAttention_0/value/kernel": (0,),
        },
    ),
    "nnx": (
        "flax",
        lambda: nnx.state(NnxModel(), nnx.Param),
        {
            "attention/key/kernel": (0,),
            "attention/out/kernel": (0, 1),
            "attention/query/kernel": (0,),
            "attention/value/kernel": (0,),
            "head/layers/0/kernel": (0,),
        },
    ),
    "haiku": (
        "haiku",
        lambda: hk.transform(haiku_model).init(KEY, TOKENS),
        {
            "gru/w_h": (0,),
            "gru/w_i": (0,),
            **{
                f"multi_head_attention/{part}/w": (0,)
                for part in ("key", "linear", "query", "value")
            },
            "mlp/~/linear_0/w": (0,),
            "mlp/~/linear_1/w": (0,),
        },
    ),
    "equinox": (
        "equinox",
        lambda: eqx.filter(EquinoxModel(), eqx.is_inexact_array),
        {
            **{f"attention/{part}_proj/weight": (1,) for part in ("query", "key", "value")},
            "attention/output_proj/weight": (1,),
            "cell/weight_ih": (1,),
            "cell/weight_hh": (1,),
            "layers/0/weight": (1, 2),
            "layers/1/weight": (1,),
        },
    ),
}


@pytest.mark.parametrize(("preset", "params", "axes"), MODELS.values(), ids=MODELS)
def test_plan_of_a_model(preset: str, params: Any, axes: dict[str, tuple[int, ...]]) -> None:
    rows = gcx.optax.plan(jax.eval_shape(params), preset)
    found = {row.name: row.layout.fan_in_axes(len(row.shape)) for row in rows if row.layout}
    assert found == axes
    assert not [row for row in rows if row.reason.startswith("unknown")]


def test_optimizer_of_nnx() -> None:
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    start = np.asarray(model.kernel[...])
    transformation = optax.chain(gcx.optax.centralize(model), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.mean((m(jnp.eye(4)) - 1.0) ** 2))(model)
    optimizer.update(model, grads)
    expected = start - 0.1 * reference.centralized(np.asarray(grads["kernel"][...]), (0,))
    np.testing.assert_allclose(model.kernel[...], expected, atol=1e-15)
    assert not np.array_equal(expected, start)


def test_train_state_of_flax() -> None:
    model, x = nn.Dense(1), jnp.eye(4)
    params = model.init(KEY, x)["params"]
    transformation = optax.chain(
        gcx.optax.centralize(gcx.optax.layouts(model, x)), optax.sgd(0.1, momentum=0.9)
    )
    state = TrainState.create(apply_fn=model.apply, params=params, tx=transformation)

    @jax.jit
    def step(state: TrainState) -> TrainState:
        def loss(params: Any) -> Any:
            return jnp.mean((state.apply_fn({"params": params}, x) - 1.0) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(5):
        state = step(state)
    change = state.params["kernel"] - params["kernel"]
    assert np.abs(change).max() > 1e-3
    np.testing.assert_allclose(reference.fan_in_means(change, (0,)), 0, atol=1e-7)


def test_filtered_trees_of_equinox() -> None:
    # Functions are leaves of the model, and None in its gradient.
    model = eqx.nn.MLP(4, 1, 8, 2, key=KEY)
    optimizer = optax.chain(optax.adamw(0.01), gcx.optax.centralize(model))
    x = jnp.eye(4)

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        grads = eqx.filter_grad(lambda m: jnp.mean((jax.vmap(m)(x) - 1.0) ** 2))(model)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state

    trained, state = model, optimizer.init(eqx.filter(model, eqx.is_array))
    for _ in range(5):
        trained, state = step(trained, state)
    for before, after in zip(model.layers, trained.layers, strict=True):
        change = np.asarray(after.weight - before.weight)
        assert np.abs(change).max() > 1e-3
        np.testing.assert_allclose(reference.fan_in_means(change, (1,)), 0, atol=1e-7)


# --- models in containers -------------------------------------------------------------------------

RNGS = nnx.Rngs(0)
MODELS_IN_CONTAINERS: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "equinox": (
        {"actor": eqx.nn.Linear(4, 3, key=KEY), "more": [eqx.nn.Conv1d(2, 3, 4, key=KEY)]},
        lambda model: eqx.filter(model, eqx.is_inexact_array),
        {"actor/weight": "Linear", "more/0/weight": "Conv"},
    ),
    "nnx": (
        [{"actor": nnx.Linear(4, 3, rngs=RNGS)}, (nnx.Param(jnp.ones((2, 2))),)],
        lambda model: nnx.state(model, nnx.Param),
        {"0/actor/kernel": "Linear", "1/0": "unknown: nobody declared list.1/0"},
    ),
    "nnx.List": (
        nnx.List([nnx.Linear(4, 3, rngs=RNGS), nnx.Param(jnp.ones((2, 2)))]),
        lambda model: nnx.state(model, nnx.Param),
        {"0/kernel": "Linear", "1": "unknown: nobody declared List.1"},
    ),
}


@pytest.mark.parametrize(
    ("model", "params", "reasons"), MODELS_IN_CONTAINERS.values(), ids=MODELS_IN_CONTAINERS
)
def test_models_in_containers(model: Any, params: Any, reasons: dict[str, str]) -> None:
    rows = gcx.optax.plan(params(model), model)
    assert {r.name: r.reason for r in rows if r.shape and r.reason != "bias"} == reasons
    updates, _ = gcx.optax.centralize(model).update(params(model), optax.EmptyState())
    for row, before, after in zip(
        (row for row in rows if row.shape),
        jax.tree.leaves(params(model)),
        jax.tree.leaves(updates),
        strict=True,
    ):
        axes = row.layout.fan_in_axes(before.ndim) if row.layout else None
        expected = reference.centralized(np.asarray(before), axes) if axes else before
        np.testing.assert_allclose(after, expected, atol=1e-6)
