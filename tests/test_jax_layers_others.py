"""gcx.optax.layouts on Equinox and Haiku modules: how they are wrapped, tied, stacked and named."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest

import gcx.optax
from gcx import Layout
from gcx.plan import LeaveAlone

from jax_models import KEY, plan_of, said

pytestmark = pytest.mark.usefixtures("compiled_in_haste")


class Wrappers(eqx.Module):
    tokens: Any
    layers: dict[str, Any]

    def __init__(self) -> None:
        linear = eqx.nn.Linear(4, 3, use_bias=False, key=KEY)
        self.tokens = jnp.zeros((1, 4))
        self.layers = {
            "mlp": eqx.nn.MLP(
                4, 3, 5, 1, eqx.nn.PReLU(), use_bias=False, use_final_bias=False, key=KEY
            ),
            "spectral": eqx.nn.SpectralNorm(linear, "weight", key=KEY),
            "weight_norm": eqx.nn.WeightNorm(linear),
        }

    def __call__(self, x: Any) -> Any:
        return x


def test_wrappers_of_equinox() -> None:
    assert said(plan_of(Wrappers())) == {
        "layers/mlp/activation/negative_slope": "slope of an activation",
        "layers/mlp/layers/0/weight": "oi Linear",
        "layers/mlp/layers/1/weight": "oi Linear",
        "layers/spectral/layer/weight": "oi Linear",
        "layers/spectral/uv_index/init/0": "state of a layer",
        "layers/spectral/uv_index/init/1": "state of a layer",
        "layers/weight_norm/g": "weight norm: the length of a weight",
        "layers/weight_norm/layer/weight": "oi Linear",
        "tokens": "unknown: nobody declared Wrappers.tokens",
    }


@pytest.mark.parametrize("kept", [0, 1])
def test_tied_parameters_of_equinox(kept: int) -> None:
    pair = (eqx.nn.Embedding(5, 4, key=KEY), eqx.nn.Linear(4, 5, use_bias=False, key=KEY))
    model = eqx.nn.Shared(pair, lambda p: p[1 - kept].weight, lambda p: p[kept].weight)
    ((name, reason),) = said(plan_of(model)).items()
    assert name == f"pytree/{kept}/weight"
    assert reason.startswith("tied, and the rules differ: embedding")
    alike = eqx.nn.Shared((pair[1], pair[1]), lambda p: p[1].weight, lambda p: p[0].weight)
    assert said(plan_of(alike)) == {"pytree/0/weight": "oi Linear"}


class Opaque:
    """A node that does not tell how to get inside."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer


jax.tree_util.register_pytree_node(
    Opaque, lambda node: ((node.layer,), None), lambda _, children: Opaque(*children)
)


class Projections(eqx.Module):
    query: Any
    value: Any


def test_fields_of_equinox() -> None:
    """One may be called value, or hold a node without keys."""
    layer = eqx.nn.Linear(4, 3, use_bias=False, key=KEY)
    found = said(plan_of(Projections(Opaque(layer), layer)))
    assert found == {"query/0/weight": "oi Linear", "value/weight": "oi Linear"}


# --- Haiku ----------------------------------------------------------------------------------------


def with_state(x: Any, with_head: bool) -> Any:
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, True)
    weight = hk.get_parameter("weight", (3, 4), init=jnp.zeros)
    return hk.nets.MLP([4, 1])(x @ weight) if with_head else x


def test_modules_of_haiku_with_state_and_options() -> None:
    transformed = hk.transform_with_state(with_state)
    layouts = gcx.optax.layouts(transformed, X, with_head=True)
    assert layouts["mlp/~/linear_0/w"] == layouts["mlp/~/linear_1/w"] == Layout("io")
    assert layouts["batch_norm/scale"] == LeaveAlone("norm")
    assert layouts["~/weight"] == LeaveAlone("unknown: it belongs to no module")
    assert "mlp/~/linear_0/w" not in gcx.optax.layouts(transformed, X, False)


class OwnWeight(hk.Module):
    def __call__(self, x: Any) -> Any:
        return hk.Linear(4)(x) @ hk.get_parameter("w", (4, 4), init=jnp.zeros)


def made(kind: Any, *sizes: int, **options: Any) -> Any:
    def model(x: Any) -> Any:
        layer = kind(*sizes, **options)  # Haiku wants its modules made in here
        return layer(x)

    return model


TRANSPOSED = made(hk.Conv2DTranspose, 4, 3, name="c")


def stack(layer: Any, name: str | None = None) -> Any:
    return made(lambda: hk.experimental.layer_stack(3, name=name)(layer))


def in_several_stacks(tokens: Any) -> Any:
    x = hk.Embed(7, 4, name="layer")(tokens)
    x = stack(made(hk.Linear, 4, name="layer"), "a")(x)
    return stack(made(hk.Conv1DTranspose, 4, 3, name="layer"), "b")(x)


def another_inside(x: Any) -> Any:
    hk.transform(TRANSPOSED).init(KEY, x)
    return hk.Conv2D(4, 3, name="c", with_bias=False)(x)


X, X1, MASK = jnp.zeros((2, 3)), jnp.zeros((1, 7, 3)), jnp.tril(jnp.ones((3, 3, 4)))
MASKED = {"b": "bias", "w": "masked: the mean would take in the entries behind the mask"}
STACK = "__layer_stack_no_per_layer/linear"
HAIKU: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "own weight": (
        made(OwnWeight, name="own"),
        X,
        {
            "own/w": "unknown: nobody declared OwnWeight.w",
            "own/linear/w": "io Linear",
            "own/linear/b": "bias",
        },
    ),
    "several stacks": (
        in_several_stacks,
        jnp.zeros((2, 5), int),
        {
            "layer/embeddings": "embedding: a row is an input, not an output unit",
            "a/layer/b": "bias",
            "a/layer/w": "bio Linear",
            "b/layer/b": "bias",
            "b/layer/w": "bioi ConvNDTranspose",
        },
    ),
    "LSTM": (
        lambda x: hk.LSTM(4)(x, hk.LSTMState(*jnp.zeros((2, 2, 4)))),
        X,
        {"lstm/linear/b": "bias", "lstm/linear/w": "io Linear"},
    ),
    "stack and head": (
        lambda x: hk.Linear(3)(stack(made(hk.Linear, 8))(x)),
        jnp.ones((2, 8)),
        {f"{STACK}/b": "bias", f"{STACK}/w": "bio Linear", "linear/b": "bias"}
        | {"linear/w": "io Linear"},
    ),
    "another inside": (
        another_inside,
        jnp.ones((1, 8, 8, 4)),
        {"c/w": "unknown: two layers have this name, a ConvNDTranspose and a ConvND"},
    ),
    "masked": (
        made(hk.Conv1D, 4, 3, mask=MASK),
        X1,
        {f"conv1_d/{name}": text for name, text in MASKED.items()},
    ),
    "masked, transposed": (
        made(hk.Conv1DTranspose, 4, 3, mask=jnp.ones((3, 4, 3), X.dtype)),
        X1,
        {f"conv1_d_transpose/{name}": text for name, text in MASKED.items()},
    ),
}


@pytest.mark.parametrize(("model", "x", "expected"), HAIKU.values(), ids=HAIKU)
def test_modules_of_haiku(model: Any, x: Any, expected: dict[str, str]) -> None:
    assert said(plan_of(hk.transform(model), x)) == expected


def lifted(x: Any) -> Any:
    inner = hk.transform(TRANSPOSED)
    return inner.apply(hk.lift(inner.init)(KEY, x), None, x)


@pytest.mark.parametrize(("before", "layout"), [(stack(TRANSPOSED), "biioi"), (lifted, "...oi")])
def test_layer_with_the_name_of_one_that_was_lifted(before: Any, layout: str) -> None:
    model = hk.transform(lambda x: hk.Conv2D(4, 3, name="c")(before(x)))
    found = said(plan_of(model, jnp.ones((1, 8, 8, 4))))
    assert found.pop("c/w") == "...o ConvND"
    (weight,) = (text for name, text in found.items() if name.endswith("/w"))
    assert weight == f"{layout} ConvNDTranspose"
