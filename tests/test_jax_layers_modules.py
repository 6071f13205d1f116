"""gcx.optax.layouts on modules that are wrapped, tied, stacked, masked, made or named unusually."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import gcx.optax
from gcx import Layout
from gcx.plan import LeaveAlone

from jax_models import KEY, KEYS, Stacked, made, plan_of, said

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

X, X1, RNGS = jnp.zeros((2, 3)), jnp.zeros((1, 7, 3)), nnx.Rngs(0)
MASK = jnp.tril(jnp.ones((3, 3, 4)))


class ByUseOfSetup(nn.Module):
    """Shares layers, and leaves one unused."""

    def setup(self) -> None:
        self.embed = nn.Embed(7, 4)
        self.blocks = [nn.Dense(4), nn.Dense(4)]
        self.unused_in_call = nn.Dense(9)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.blocks[0](x))


class Adapted(nn.Module):
    """Puts its own parameters beside those of the layer that it wraps."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer = nn.Dense(4)
        nn.share_scope(self, layer)
        low = x @ self.param("down", nn.initializers.lecun_normal(), (x.shape[-1], 2))
        scale = self.param("scale", lambda _: 0.5)
        return layer(x) + scale * (low @ self.param("up", nn.initializers.zeros, (2, 4)))


class Transposed(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.ConvTranspose(4, (3, 3), transpose_kernel=True, name="c")(x)


class WithAnother(nn.Module):
    """Calls the init of another model, which has a layer of the same name."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        Transposed(parent=None).init(KEY, x)
        return nn.Conv(4, (3, 3), name="c", use_bias=False)(x)


class Held(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.tokens = nnx.Param(jnp.zeros((1, 4)))
        self.listed = nnx.List([nnx.Linear(4, 2, rngs=rngs), nnx.Param(jnp.zeros((2, 2)))])
        self.by_name = nnx.Dict(inner=nnx.Linear(4, 2, rngs=rngs))
        self.twice = self.by_name.inner
        self.tree = nnx.Param({"a": jnp.zeros((1, 4)), "b": 0.5})
        self.statistics = nnx.BatchStat(jnp.zeros((2, 2)))


def of_another_shape() -> nnx.Module:
    model = nnx.Linear(4, 6, rngs=RNGS)
    model.kernel = nnx.Param(jnp.zeros((6, 4)))
    return model


def stacked_along_axis_1() -> nnx.Module:
    axes = nnx.StateAxes({nnx.Param: 1, ...: 0})
    return nnx.vmap(lambda key: nnx.Linear(4, 6, rngs=nnx.Rngs(key)), out_axes=axes)(KEYS)


PLAIN = eqx.nn.Linear(4, 3, use_bias=False, key=KEY)


class Wrappers(eqx.Module):
    tokens: Any
    layers: dict[str, Any]

    def __init__(self) -> None:
        self.tokens = jnp.zeros((1, 4))
        self.layers = {
            "mlp": eqx.nn.MLP(
                4, 3, 5, 1, eqx.nn.PReLU(), use_bias=False, use_final_bias=False, key=KEY
            ),
            "spectral": eqx.nn.SpectralNorm(PLAIN, "weight", key=KEY),
            "weight_norm": eqx.nn.WeightNorm(PLAIN),
        }


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


class OwnWeight(hk.Module):
    def __call__(self, x: Any) -> Any:
        return hk.Linear(4)(x) @ hk.get_parameter("w", (4, 4), init=jnp.zeros)


def stack(layer: Any, name: str | None = None) -> Any:
    return made(lambda: hk.experimental.layer_stack(3, name=name)(layer))


def in_several_stacks(tokens: Any) -> Any:
    x = hk.Embed(7, 4, name="layer")(tokens)
    x = stack(made(hk.Linear, 4, name="layer"), "a")(x)
    return stack(made(hk.Conv1DTranspose, 4, 3, name="layer"), "b")(x)


TRANSPOSED = made(hk.Conv2DTranspose, 4, 3, name="c")


def another_inside(x: Any) -> Any:
    hk.transform(TRANSPOSED).init(KEY, x)
    return hk.Conv2D(4, 3, name="c", with_bias=False)(x)


LINEAR, DENSE = {"bias": "bias", "kernel": "io Linear"}, {"bias": "bias", "kernel": "io Dense"}
IS_MASKED = "masked: the mean would take in the entries behind the mask"
MASKED = {"bias": "bias", "kernel": IS_MASKED}
EMBEDDING = "embedding: a row is an input, not an output unit"
STACK = "__layer_stack_no_per_layer/linear"
BOXED = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
# A model with its inputs, and its plan.
MODELS: dict[str, tuple[tuple[Any, ...], dict[str, str]]] = {
    "boxed": ((nn.Dense(4, kernel_init=BOXED), X), DENSE),
    "shared scope": (
        (Adapted(), X),
        DENSE
        | {name: f"unknown: nobody declared Adapted.{name}" for name in ("down", "up")}
        | {"scale": "a scalar has no fan-in"},
    ),
    "setup": (
        (ByUseOfSetup(), jnp.zeros((2, 3), int)),
        {f"blocks_{k}/{name}": text for k in range(2) for name, text in DENSE.items()}
        | {"embed/embedding": EMBEDDING},
    ),
    "another inside": (
        (WithAnother(), jnp.ones((1, 8, 8, 4))),
        {"c/kernel": "unknown: two layers have this name, a ConvTranspose and a Conv"},
    ),
    "masked": ((nn.Conv(4, (3,), mask=MASK), X1), MASKED),
    "masked, local": ((nn.ConvLocal(4, (3,), mask=jnp.ones((7, 9, 4), X.dtype)), X1), MASKED),
    "nnx, masked": ((nnx.ConvTranspose(3, 4, (3,), mask=MASK, rngs=RNGS),), MASKED),
    "nnx, lists and dicts": (
        (Held(),),
        {f"{of}/{n}": text for of in ("by_name/inner", "listed/0") for n, text in LINEAR.items()}
        | {n: f"unknown: nobody declared Held.{n}" for n in ("listed/1", "tokens", "tree/a")},
    ),
    "nnx, in a list": (
        ([{"a": nnx.Linear(4, 3, rngs=RNGS)}, (nnx.Param(jnp.ones((2, 2))),)],),
        {f"0/a/{n}": text for n, text in LINEAR.items()}
        | {"1/0": "unknown: nobody declared list.1/0"},
    ),
    "nnx, in its own list": (
        (nnx.List([nnx.Linear(4, 3, rngs=RNGS), nnx.Param(jnp.ones((2, 2)))]),),
        {f"0/{n}": text for n, text in LINEAR.items()} | {"1": "unknown: nobody declared List.1"},
    ),
    "nnx, stacked": ((stacked_along_axis_1(),), {"bias": "bias", "kernel": "ibo Linear"}),
    "nnx, another shape": (
        (of_another_shape(),),
        {"bias": "bias", "kernel": "unknown: the shape is (6, 4), but a Linear has (4, 6)"},
    ),
    "haiku, own weight": (
        (hk.transform(made(OwnWeight, name="own")), X),
        {"own/w": "unknown: nobody declared OwnWeight.w"}
        | {"own/linear/w": "io Linear", "own/linear/b": "bias"},
    ),
    "haiku, another inside": (
        (hk.transform(another_inside), jnp.ones((1, 8, 8, 4))),
        {"c/w": "unknown: two layers have this name, a ConvNDTranspose and a ConvND"},
    ),
    "haiku, several stacks": (
        (hk.transform(in_several_stacks), jnp.zeros((2, 5), int)),
        {"layer/embeddings": EMBEDDING, "a/layer/b": "bias", "b/layer/b": "bias"}
        | {"a/layer/w": "bio Linear", "b/layer/w": "bioi ConvNDTranspose"},
    ),
    "haiku, stack and head": (
        (hk.transform(lambda x: hk.Linear(3)(stack(made(hk.Linear, 8))(x))), jnp.ones((2, 8))),
        {f"{STACK}/b": "bias", f"{STACK}/w": "bio Linear"}
        | {"linear/b": "bias", "linear/w": "io Linear"},
    ),
    "haiku, masked": (
        (hk.transform(made(hk.Conv1D, 4, 3, mask=MASK)), X1),
        {"conv1_d/b": "bias", "conv1_d/w": IS_MASKED},
    ),
    "equinox": (
        (Wrappers(),),
        {
            "layers/mlp/activation/negative_slope": "slope of an activation",
            "layers/mlp/layers/0/weight": "oi Linear",
            "layers/mlp/layers/1/weight": "oi Linear",
            "layers/spectral/layer/weight": "oi Linear",
            "layers/spectral/uv_index/init/0": "state of a layer",
            "layers/spectral/uv_index/init/1": "state of a layer",
            "layers/weight_norm/g": "weight norm: the length of a weight",
            "layers/weight_norm/layer/weight": "oi Linear",
            "tokens": "unknown: nobody declared Wrappers.tokens",
        },
    ),
    "equinox, in a dict": (
        ({"actor": PLAIN, "more": [eqx.nn.Conv1d(2, 3, 4, use_bias=False, key=KEY)]},),
        {"actor/weight": "oi Linear", "more/0/weight": "o... Conv"},
    ),
    "equinox, fields": (
        (Projections(Opaque(PLAIN), PLAIN),),
        {"query/0/weight": "oi Linear", "value/weight": "oi Linear"},
    ),
}


@pytest.mark.parametrize(("model", "expected"), MODELS.values(), ids=MODELS)
def test_every_parameter(model: tuple[Any, ...], expected: dict[str, str]) -> None:
    assert said(plan_of(*model)) == expected


class Wrapped(nn.Module):
    """Modules in transformations: the stack of the second has its axis in the middle."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        stacked = {"split_rngs": {"params": True}}
        x = nn.vmap(nn.Dense, variable_axes={"params": 0}, in_axes=-2, out_axes=-2, **stacked)(
            4, name="vmapped"
        )(x)
        x, _ = nn.scan(Stacked, variable_axes={"params": 1}, length=3, **stacked)(name="scanned")(
            x, None
        )
        x = nn.remat(nn.Dense)(5, name="rematerialized")(x)
        x = nn.jit(nn.Dense)(4, name="compiled")(x)
        x = nn.RNN(nn.OptimizedLSTMCell(3))(x)
        x = nn.WeightNorm(nn.Dense(2))(x)
        return nn.SpectralNorm(nn.Dense(2))(x, update_stats=True)


def test_modules_in_transformations() -> None:
    found = said(plan_of(Wrapped(), jax.ShapeDtypeStruct((2, 6, 8), "float32")))
    cells = [f"OptimizedLSTMCell_0/{a}{b}" for a in "ih" for b in "ifgo"]
    assert {name: text for name, text in found.items() if name.endswith("kernel")} == {
        **{f"Dense_{k}/kernel": "io Dense" for k in range(2)},
        **{f"{name}/kernel": "io DenseParams" for name in cells},
        "compiled/kernel": "io Dense",
        "rematerialized/kernel": "io Dense",
        "scanned/Dense_0/kernel": "ibo Dense",
        "vmapped/kernel": "bio Dense",
    }


class Tied(nnx.Module):
    def __init__(self, other: Callable[[], nnx.Module], name: str) -> None:
        self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.second = other()
        setattr(self.second, name, self.first.kernel)


def test_tied_parameters_of_nnx() -> None:
    alike = Tied(lambda: nnx.Linear(4, 4, rngs=RNGS), "kernel")
    assert said(plan_of(alike))["first/kernel"] == "io Linear"
    table = Tied(lambda: nnx.Embed(4, 4, rngs=RNGS), "embedding")
    layouts = gcx.optax.layouts(table)
    assert set(layouts) == {"first/bias", "first/kernel"}
    assert layouts["first/kernel"] == LeaveAlone(
        "tied, and the rules differ: Linear; "
        "second/embedding: embedding: a row is an input, not an output unit"
    )


@pytest.mark.parametrize("kept", [0, 1])
def test_tied_parameters_of_equinox(kept: int) -> None:
    pair = (eqx.nn.Embedding(5, 4, key=KEY), eqx.nn.Linear(4, 5, use_bias=False, key=KEY))
    model = eqx.nn.Shared(pair, lambda p: p[1 - kept].weight, lambda p: p[kept].weight)
    ((name, reason),) = said(plan_of(model)).items()
    assert name == f"pytree/{kept}/weight"
    assert reason.startswith("tied, and the rules differ: embedding")
    alike = eqx.nn.Shared((pair[1], pair[1]), lambda p: p[1].weight, lambda p: p[0].weight)
    assert said(plan_of(alike)) == {"pytree/0/weight": "oi Linear"}


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
