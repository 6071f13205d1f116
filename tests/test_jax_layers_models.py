"""gcx.optax.layouts on whole models of Flax, Equinox and Haiku."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("optax")
pytest.importorskip("flax")
pytest.importorskip("haiku")
pytest.importorskip("equinox")

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import gcx.optax
from gcx import Layout
from gcx.optax._models import RULES
from gcx.plan import LeaveAlone, Plan

from reference import fan_in_means

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 3)
IMAGES = jax.ShapeDtypeStruct((2, 7, 7, 3), "float32")

Axes = dict[str, tuple[int, ...] | None]


def axes_of(plan: Plan) -> Axes:
    """Fan-in axes of each parameter, None where it is left alone."""
    return {
        row.name: row.layout.fan_in_axes(len(row.shape)) if row.layout else None
        for row in plan
        if row.reason != "not an array"  # what a layer of Equinox does without
    }


def linen_axes(model: nn.Module, *inputs: Any, **keyword_inputs: Any) -> Axes:
    params = jax.eval_shape(partial(model.init, **keyword_inputs), KEY, *inputs)["params"]
    layouts = gcx.optax.layouts(model, *inputs, **keyword_inputs)
    return axes_of(gcx.optax.plan(params, layouts))


def nnx_axes(model: nnx.Module) -> Axes:
    return axes_of(gcx.optax.plan(nnx.state(model, nnx.Param), model))


def equinox_axes(model: eqx.Module) -> Axes:
    return axes_of(gcx.optax.plan(eqx.filter(model, eqx.is_inexact_array), model))


def haiku_axes(model: Callable[..., Any], *inputs: Any) -> Axes:
    transformed = hk.transform(model)
    params = jax.eval_shape(transformed.init, KEY, *inputs)
    return axes_of(gcx.optax.plan(params, gcx.optax.layouts(transformed, *inputs)))


# --- every kind of parameter, with its true fan-in axes -------------------------------------------


class Stacked(nn.Module):
    """A layer to scan over: it takes a carry."""

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return nn.Dense(x.shape[-1])(x), None


class OfLinen(nn.Module):
    @nn.compact
    def __call__(self, images: Any) -> Any:
        x = nn.Conv(4, (3, 3))(images)
        x = nn.Conv(8, (3, 3), feature_group_count=4, use_bias=False)(x)
        x = nn.ConvTranspose(6, (3, 3), use_bias=False)(x)
        x = nn.ConvTranspose(8, (3, 3), transpose_kernel=True, use_bias=False)(x)
        x = nn.LayerNorm(reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3))(x).mean((1, 2))
        x = x[:, None] + nn.Embed(7, 8)(jnp.arange(5))
        x = nn.MultiHeadDotProductAttention(2)(x)
        x = nn.DenseGeneral((2, 4))(x)
        x = nn.DenseGeneral(8, axis=(-2, -1), use_bias=False)(x)
        x, _ = nn.scan(Stacked, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(
            name="scanned"
        )(x, None)
        x = nn.PReLU()(x)
        return nn.Dense(1)(x)


def stack_of_linears(keys: Any) -> Any:
    return nnx.vmap(lambda key: nnx.Linear(4, 6, rngs=nnx.Rngs(key)))(keys)


class OfNnx(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.up = nnx.ConvTranspose(4, 3, (3, 3), transpose_kernel=True, use_bias=False, rngs=rngs)
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, use_bias=False, rngs=rngs)
        self.adapted = nnx.LoRALinear(6, 4, lora_rank=2, use_bias=False, rngs=rngs)
        self.stack = stack_of_linears(KEYS)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)


class OfEquinox(eqx.Module):
    layers: list[Any]

    def __init__(self) -> None:
        self.layers = [
            eqx.nn.Linear(6, 4, key=KEY),
            eqx.nn.Conv2d(3, 4, 3, key=KEY),
            eqx.nn.ConvTranspose2d(4, 3, 3, key=KEY),
            eqx.nn.MultiheadAttention(2, 8, key=KEY),
            eqx.nn.Embedding(7, 4, key=KEY),
            eqx.nn.LayerNorm((5, 8)),
            eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 6, key=key))(KEYS),
            eqx.nn.Linear("scalar", 4, key=KEY),
        ]


def of_haiku(images: Any) -> Any:
    x = hk.Conv2D(4, 3)(images)
    x = hk.DepthwiseConv2D(2, 3, with_bias=False)(x)
    x = hk.Conv2DTranspose(5, 3, with_bias=False, name="up")(x)
    x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x).mean((1, 2))
    x = x + hk.Embed(7, 5)(jnp.arange(2))
    x = hk.experimental.layer_stack(3)(hk.Linear(5, name="stacked"))(x)
    x, _ = hk.LSTM(4)(x, hk.LSTMState(jnp.zeros((2, 4)), jnp.zeros((2, 4))))
    return hk.Linear(1)(x)


# The number of parameters, and the names of those with a fan-in by its axes; others are left alone.
MODELS: dict[str, tuple[Callable[[], Axes], int, dict[tuple[int, ...], str]]] = {
    "linen": (
        lambda: linen_axes(OfLinen(), IMAGES),
        24,
        {
            (0,): "DenseGeneral_0 Dense_0 {attention}/key {attention}/query {attention}/value",
            (0, 1): "DenseGeneral_1 {attention}/out",
            (0, 1, 2): "Conv_0 Conv_1 ConvTranspose_0",
            (0, 1, 3): "ConvTranspose_1",
            (1,): "scanned/Dense_0",
        },
    ),
    "linen, by setup": (
        lambda: linen_axes(ByUseOfSetup(), jnp.zeros((2, 3), int)),
        5,
        {(0,): "blocks_0 blocks_1"},  # layers that are shared, and none that is not used
    ),
    "linen, in transformations": (
        lambda: linen_axes(Wrapped(), jax.ShapeDtypeStruct((2, 6, 8), "float32")),
        25,
        {
            (0,): "Dense_0 Dense_1 compiled rematerialized scanned/Dense_0 "  # (4, 3, 4)
            + " ".join(f"OptimizedLSTMCell_0/{a}{b}" for a in "ih" for b in "ifgo"),
            (1,): "vmapped",  # (6, 8, 4)
        },
    ),
    "nnx": (
        lambda: nnx_axes(OfNnx()),
        17,
        {
            (0,): "adapted adapted/lora/lora_a adapted/lora/lora_b attention/key attention/query "
            "attention/value head",
            (0, 1): "attention/out",
            (0, 1, 2): "conv",
            (0, 1, 3): "up",
            (1,): "stack",
        },
    ),
    "equinox": (
        lambda: equinox_axes(OfEquinox()),
        17,
        {(1,): "0 3/query_proj 3/key_proj 3/value_proj 3/output_proj", (1, 2, 3): "1 2", (2,): "6"},
    ),
    "haiku": (
        lambda: haiku_axes(of_haiku, IMAGES),
        13,
        {
            (0,): "linear lstm/linear",
            (0, 1, 2): "conv2_d depthwise_conv2_d",
            (0, 1, 3): "up",
            (1,): "__layer_stack_no_per_layer/stacked",
        },
    ),
}
# What stands around the names of the weights.
PATHS = {"equinox": "layers/{}/weight", "haiku": "{}/w"}


@pytest.mark.parametrize("case", MODELS)
def test_every_parameter_of_a_model(case: str) -> None:
    find, parameters, names_by_axes = MODELS[case]
    path = PATHS.get(case, "{}/kernel")
    expected = {
        name if "lora_" in name else path.format(name): axes
        for axes, names in names_by_axes.items()
        for name in names.format(attention="MultiHeadDotProductAttention_0").split()
    }
    found = find()
    assert len(found) == parameters
    assert {name: axes for name, axes in found.items() if axes} == expected


# --- linen: how modules are made and called -------------------------------------------------------


class ByUseOfSetup(nn.Module):
    def setup(self) -> None:
        self.embed = nn.Embed(7, 4)
        self.blocks = [nn.Dense(4), nn.Dense(4)]
        self.unused_in_call = nn.Dense(9)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.blocks[0](x))  # two layers that are shared


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


class Adapted(nn.Module):
    """Puts its own parameters beside those of the layer that it wraps."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer = nn.Dense(4)
        nn.share_scope(self, layer)
        low = x @ self.param("down", nn.initializers.lecun_normal(), (x.shape[-1], 2))
        return layer(x) + low @ self.param("up", nn.initializers.zeros, (2, 4))


MASKED = LeaveAlone("masked: the mean would take in the entries behind the mask")
X = jnp.zeros((1, 7, 3))
MASK, RNGS = jnp.tril(jnp.ones((3, 3, 4))), nnx.Rngs(0)


def _haiku_conv(kind: Any, mask: Any) -> Any:
    def model(x: Any) -> Any:
        return kind(4, 3, mask=mask)(x)

    return hk.transform(model)


MASKED_CONVOLUTIONS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "linen": lambda: (nn.Conv(4, (3,), mask=MASK), X),
    "linen, transposed": lambda: (nn.ConvTranspose(4, (3,), mask=MASK), X),
    "linen, local": lambda: (nn.ConvLocal(4, (3,), mask=jnp.ones((7, 9, 4), X.dtype)), X),
    "nnx": lambda: (nnx.Conv(3, 4, (3,), mask=MASK, rngs=RNGS),),
    "nnx, transposed": lambda: (nnx.ConvTranspose(3, 4, (3,), mask=MASK, rngs=RNGS),),
    "haiku": lambda: (_haiku_conv(hk.Conv1D, MASK), X),
    "haiku, transposed": lambda: (_haiku_conv(hk.Conv1DTranspose, jnp.ones((3, 4, 3), X.dtype)), X),
}


@pytest.mark.parametrize("case", MASKED_CONVOLUTIONS)
def test_masked_convolutions_are_left_alone(case: str) -> None:
    found = gcx.optax.layouts(*MASKED_CONVOLUTIONS[case]())
    assert sorted(found.values(), key=str) == [LeaveAlone("bias"), MASKED]


def test_layers_that_share_the_scope_of_another() -> None:
    layouts = gcx.optax.layouts(Adapted(), jnp.zeros((2, 3)))
    assert layouts == {
        "bias": LeaveAlone("bias"),
        "kernel": Layout("io"),
        "down": LeaveAlone("unknown: nobody declared Adapted.down"),
        "up": LeaveAlone("unknown: nobody declared Adapted.up"),
    }


def test_names_of_boxed_parameters_end_before_the_box() -> None:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    assert linen_axes(nn.Dense(4, kernel_init=init), jnp.zeros((2, 3))) == {
        "bias": None,
        "kernel": (0,),
    }


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(4, kernel_init=_traced)(x)

    def encode(self, x: Any) -> Any:
        return self(x, train=False)


def _traced(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    value = jax.random.normal(key, shape, dtype)
    assert isinstance(value, jax.core.Tracer)
    return value


class Transposed(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.ConvTranspose(4, (3, 3), transpose_kernel=True, name="c")(x)


class WithAnother(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        Transposed(parent=None).init(KEY, x)
        return nn.Conv(4, (3, 3), name="c")(x)


def test_init_of_another_model_within_one_of_linen() -> None:
    layouts = gcx.optax.layouts(WithAnother(), jnp.ones((1, 8, 8, 4)))
    reason = "unknown: two layers have this name, a ConvTranspose and a Conv"
    assert layouts["c/kernel"] == LeaveAlone(reason)


def test_plans_name_the_layers_of_linen() -> None:
    x = jnp.zeros((2, 3))
    layouts = {f"params/{k}": v for k, v in gcx.optax.layouts(nn.Dense(4), x).items()}
    rows = gcx.optax.plan(nn.Dense(4).init(KEY, x), layouts | {"params/bias": None})
    assert [row[1:] for row in rows] == [((4,), None, "as given"), ((3, 4), Layout("io"), "Dense")]


def test_linen_is_traced_and_nothing_computed() -> None:
    x = jax.ShapeDtypeStruct((2, 3), "float32")
    names = {"BatchNorm_0/bias", "BatchNorm_0/scale", "Dense_0/bias", "Dense_0/kernel"}
    assert set(gcx.optax.layouts(Noisy(), x, train=True)) == names
    assert set(gcx.optax.layouts(Noisy(), x, method="encode")) == names


def test_names_are_those_within_params() -> None:
    model, x = nn.Dense(4), jnp.zeros((2, 3))
    variables, layouts = model.init(KEY, x), gcx.optax.layouts(model, x)
    message = r"'bias' matches no parameter; .* params/kernel; give variables\[.params.\]"
    with pytest.raises(ValueError, match=message):
        gcx.optax.centralize(layouts).init(variables)
    whole = {f"params/{name}": layout for name, layout in layouts.items()}
    gcx.optax.centralize(whole).init(variables)


# --- nnx: modules that hold modules, lists and each other's parameters ----------------------------


class Held(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.tokens = nnx.Param(jnp.zeros((1, 4)))
        self.listed = nnx.List([nnx.Linear(4, 2, rngs=rngs), nnx.Param(jnp.zeros((2, 2)))])
        self.by_name = nnx.Dict(inner=nnx.Linear(4, 2, rngs=rngs))
        self.twice = self.by_name.inner
        self.statistics = nnx.BatchStat(jnp.zeros((2, 2)))


def test_parameters_in_lists_and_dicts() -> None:
    reasons = {row.name: row.reason for row in gcx.optax.plan(nnx.state(Held(), nnx.Param), Held())}
    assert reasons == {
        "by_name/inner/bias": "bias",
        "by_name/inner/kernel": "Linear",
        "listed/0/bias": "bias",
        "listed/0/kernel": "Linear",
        "listed/1": "unknown: nobody declared Held.listed/1",
        "tokens": "unknown: nobody declared Held.tokens",
    }


class Tied(nnx.Module):
    def __init__(self, other: Callable[[], nnx.Module], name: str) -> None:
        self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.second = other()
        setattr(self.second, name, self.first.kernel)


def test_tied_parameters_of_nnx() -> None:
    rngs = nnx.Rngs(0)
    alike = Tied(lambda: nnx.Linear(4, 4, rngs=rngs), "kernel")
    assert nnx_axes(alike)["first/kernel"] == (0,)
    table = Tied(lambda: nnx.Embed(4, 4, rngs=rngs), "embedding")
    layouts = gcx.optax.layouts(table)
    assert set(layouts) == {"first/bias", "first/kernel"}
    assert layouts["first/kernel"] == LeaveAlone(
        "tied, and the rules differ: Linear; "
        "second/embedding: embedding: a row is an input, not an output unit"
    )


def test_axis_of_a_stack_of_nnx_may_be_another() -> None:
    axes = nnx.StateAxes({nnx.Param: 1, ...: 0})
    model = nnx.vmap(lambda key: nnx.Linear(4, 6, rngs=nnx.Rngs(key)), out_axes=axes)(KEYS)
    assert model.kernel.shape == (4, 3, 6)
    assert nnx_axes(model) == {"bias": None, "kernel": (0,)}


def test_weight_that_is_not_that_of_its_layer() -> None:
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    model.kernel = nnx.Param(jnp.zeros((6, 4)))
    reason = "unknown: the shape is (6, 4), but a Linear has (4, 6)"
    assert gcx.optax.layouts(model)["kernel"] == LeaveAlone(reason)


@pytest.mark.parametrize(
    ("make", "abstractly"), [(OfNnx, nnx.eval_shape), (OfEquinox, eqx.filter_eval_shape)]
)
def test_model_of_shapes(make: Callable[[], Any], abstractly: Callable[[Any], Any]) -> None:
    model, shapes = make(), abstractly(make)
    assert gcx.optax.layouts(shapes) == gcx.optax.layouts(model)
    params = nnx.state(model, nnx.Param) if make is OfNnx else eqx.filter(model, eqx.is_array)
    assert gcx.optax.plan(model) == gcx.optax.plan(shapes) == gcx.optax.plan(params, model)


# --- Equinox --------------------------------------------------------------------------------------


def reasons_of(model: Any) -> dict[str, str]:
    return {row.name: row.reason for row in gcx.optax.plan(model, model) if row.shape}


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
    assert reasons_of(Wrappers()) == {
        "layers/mlp/activation/negative_slope": "slope of an activation",
        "layers/mlp/layers/0/weight": "Linear",
        "layers/mlp/layers/1/weight": "Linear",
        "layers/spectral/layer/weight": "Linear",
        "layers/spectral/uv_index/init/0": "state of a layer",
        "layers/spectral/uv_index/init/1": "state of a layer",
        "layers/weight_norm/g": "weight norm: the length of a weight",
        "layers/weight_norm/layer/weight": "Linear",
        "tokens": "unknown: nobody declared Wrappers.tokens",
    }


@pytest.mark.parametrize("kept", [0, 1])
def test_tied_parameters_of_equinox(kept: int) -> None:
    pair = (eqx.nn.Embedding(5, 4, key=KEY), eqx.nn.Linear(4, 5, use_bias=False, key=KEY))
    model = eqx.nn.Shared(pair, lambda p: p[1 - kept].weight, lambda p: p[kept].weight)
    ((name, reason),) = reasons_of(model).items()
    assert name == f"pytree/{kept}/weight"
    assert reason.startswith("tied, and the rules differ: embedding")
    alike = eqx.nn.Shared((pair[1], pair[1]), lambda p: p[1].weight, lambda p: p[0].weight)
    assert reasons_of(alike) == {"pytree/0/weight": "Linear"}


class Opaque:
    """A node that does not tell how to get inside."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer


jax.tree_util.register_pytree_node(
    Opaque, lambda node: ((node.layer,), None), lambda _, children: Opaque(*children)
)


class Hidden(eqx.Module):
    node: Opaque


def test_layer_in_a_node_without_keys() -> None:
    model = Hidden(Opaque(eqx.nn.Linear(4, 3, use_bias=False, key=KEY)))
    assert reasons_of(model) == {"node/0/weight": "Linear"}


# --- Haiku ----------------------------------------------------------------------------------------


def test_modules_of_haiku_with_state_and_options() -> None:
    def model(x: Any, with_head: bool) -> Any:
        x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, True)
        weight = hk.get_parameter("weight", (3, 4), init=jnp.zeros)
        return hk.nets.MLP([4, 1])(x @ weight) if with_head else x

    transformed = hk.transform_with_state(model)
    layouts = gcx.optax.layouts(transformed, jnp.zeros((2, 3)), with_head=True)
    assert layouts["mlp/~/linear_0/w"] == layouts["mlp/~/linear_1/w"] == Layout("io")
    assert layouts["batch_norm/scale"] == LeaveAlone("norm")
    assert layouts["~/weight"] == LeaveAlone("unknown: it belongs to no module")
    assert "mlp/~/linear_0/w" not in gcx.optax.layouts(transformed, jnp.zeros((2, 3)), False)


class OwnWeight(hk.Module):
    def __call__(self, x: Any) -> Any:
        return hk.Linear(4)(x) @ hk.get_parameter("w", (4, 4), init=jnp.zeros)


def test_own_parameter_of_an_unknown_module_of_haiku() -> None:
    def model(x: Any) -> Any:
        return OwnWeight(name="own")(x)

    transformed = hk.transform(model)
    assert gcx.optax.layouts(transformed, jnp.zeros((2, 3))) == {
        "own/w": LeaveAlone("unknown: nobody declared OwnWeight.w"),
        "own/linear/w": Layout("io"),
        "own/linear/b": LeaveAlone("bias"),
    }


def test_layers_of_the_same_name_in_several_stacks() -> None:
    def model(x: Any) -> Any:
        def linear(x: Any) -> Any:
            return hk.Linear(4, name="layer")(x)

        def transposed(x: Any) -> Any:
            return hk.Conv1DTranspose(4, 3, name="layer")(x)

        x = hk.Embed(7, 4, name="layer")(x)
        x = hk.experimental.layer_stack(2, name="a")(linear)(x)
        return hk.experimental.layer_stack(2, name="b")(transposed)(x)

    assert haiku_axes(model, jnp.zeros((2, 5), int)) == {
        "layer/embeddings": None,
        "a/layer/b": None,
        "a/layer/w": (1,),
        "b/layer/b": None,
        "b/layer/w": (1, 3),
    }


def transposed(x: Any) -> Any:
    return hk.Conv2DTranspose(4, 3, name="c")(x)


def stacked(x: Any) -> Any:
    return hk.experimental.layer_stack(3)(transposed)(x)


def lifted(x: Any) -> Any:
    inner = hk.transform(transposed)
    return inner.apply(hk.lift(inner.init)(KEY, x), None, x)


@pytest.mark.parametrize("before", [stacked, lifted])
def test_layer_with_the_name_of_one_that_was_lifted(before: Callable[[Any], Any]) -> None:
    def model(x: Any) -> Any:
        return hk.Conv2D(4, 3, name="c")(before(x))

    layouts = gcx.optax.layouts(hk.transform(model), jnp.ones((1, 8, 8, 4)))
    assert layouts.pop("c/w") == Layout("...o")
    (weight,) = (layout for name, layout in layouts.items() if name.endswith("/w"))
    assert weight in (Layout("...oi"), Layout("biioi"))


def test_head_after_a_stack_of_the_same_kind() -> None:
    def linear(x: Any) -> Any:
        return hk.Linear(8)(x)

    def model(x: Any) -> Any:
        return hk.Linear(3)(hk.experimental.layer_stack(3)(linear)(x))

    assert haiku_axes(model, jnp.ones((2, 8)))["linear/w"] == (0,)


def test_init_of_another_model_within_one_of_haiku() -> None:
    def model(x: Any) -> Any:
        hk.transform(transposed).init(KEY, x)
        return hk.Conv2D(4, 3, name="c")(x)

    layouts = gcx.optax.layouts(hk.transform(model), jnp.ones((1, 8, 8, 4)))
    reason = "unknown: two layers have this name, a ConvNDTranspose and a ConvND"
    assert layouts["c/w"] == LeaveAlone(reason)


# --- layers of others -----------------------------------------------------------------------------


def forget(kind: type) -> None:
    del RULES._by_type[kind]


def test_layers_of_others_register_a_rule(request: pytest.FixtureRequest) -> None:
    class Experts(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.zeros((2, 3, 4)))
            self.gate = nnx.Param(jnp.zeros((3, 2)))
            self.bias_in = nnx.Param(jnp.zeros((2, 4)))

    class MoreExperts(Experts):
        pass

    assert nnx_axes(Experts()) == dict.fromkeys(("bias_in", "gate", "w"))
    request.addfinalizer(partial(forget, Experts))

    @gcx.optax.register_layer(Experts)
    def rule(layer: Experts) -> dict[str, Any]:
        return {"w": "oio", "gate": None, "bias_*": LeaveAlone("bias of an expert")}

    assert rule.__name__ == "rule"
    rows = gcx.optax.plan(nnx.state(MoreExperts(), nnx.Param), MoreExperts())
    assert [(row.layout, row.reason) for row in rows] == [
        (None, "bias of an expert"),
        (None, "left alone by the rule of Experts"),
        (Layout("oio"), "Experts"),
    ]


def test_subclass_follows_its_base_class() -> None:
    class Mine(nn.Dense):
        pass

    assert gcx.optax.layouts(Mine(4), jnp.zeros((2, 3)))["kernel"] == Layout("io")


# --- in the optimizer -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [OfNnx, OfEquinox], ids=["nnx", "equinox"])
def test_model_itself_is_enough(make: Callable[[], Any]) -> None:
    model = make()
    params = nnx.state(model, nnx.Param) if make is OfNnx else eqx.filter(model, eqx.is_array)
    by_model, by_mapping = model, gcx.optax.layouts(model)
    grads = jax.tree.map(lambda a: jax.random.normal(KEY, a.shape), params)
    results = []
    for layouts in (by_model, by_mapping):
        optimizer = gcx.optax.centralize(layouts)
        updates, _ = optimizer.update(grads, optimizer.init(params))
        results.append(updates)
    jax.tree.map(np.testing.assert_array_equal, *results)
    axes = axes_of(gcx.optax.plan(params, model))
    for (name, fan_in), leaf in zip(axes.items(), jax.tree.leaves(results[0]), strict=True):
        if fan_in:
            np.testing.assert_allclose(fan_in_means(leaf, fan_in), 0, atol=1e-6, err_msg=name)


def test_part_of_a_model_may_be_trained() -> None:
    model = OfNnx()
    optimizer = nnx.Optimizer(
        model, optax.chain(gcx.optax.centralize(model), optax.sgd(0.1)), wrt=nnx.LoRAParam
    )
    assert jax.tree.leaves(optimizer.opt_state) is not None
    rows = gcx.optax.plan(nnx.state(model, nnx.LoRAParam), model)
    assert [row.name for row in rows if row.layout] == [
        "adapted/lora/lora_a",
        "adapted/lora/lora_b",
    ]


MODELS_WITHOUT_INPUTS = {
    "linen": (OfLinen(), "flax.linen"),
    "haiku": (hk.transform(of_haiku), "haiku"),
    "haiku with state": (hk.transform_with_state(of_haiku), "haiku"),
}


@pytest.mark.parametrize(
    ("model", "module"), MODELS_WITHOUT_INPUTS.values(), ids=MODELS_WITHOUT_INPUTS
)
def test_model_that_has_no_layers_yet(model: Any, module: str) -> None:
    message = (
        f"a {module} model has no layers before it sees an input: give gcx.optax.layouts(model, "
        "*example_inputs), where an example input is an array or jax.ShapeDtypeStruct(shape, dtype)"
    )
    for use in (gcx.optax.centralize, gcx.optax.plan, partial(gcx.optax.plan, {})):
        with pytest.raises(TypeError, match=re.escape(message)):
            use(model)
    for shape in ((2, 7, 7, 3), [2, 7], ((2, 7), "float32")):
        with pytest.raises(TypeError, match=r"^an example input is an array or jax\.ShapeD.*, not"):
            gcx.optax.layouts(model, shape)
    with pytest.raises((AttributeError, IndexError, TypeError, ValueError)) as error:
        gcx.optax.layouts(model, 7)
    assert any("jax.ShapeDtypeStruct(shape, dtype)" in note for note in error.value.__notes__)


def test_models_in_containers_that_have_no_layers_yet() -> None:
    for models in ([nn.Dense(3)], {"a": nn.Dense(3)}, [hk.transform(of_haiku)]):
        with pytest.raises(TypeError, match=r"give gcx\.optax\.layouts\(model, "):
            gcx.optax.centralize(models)
        with pytest.raises(TypeError, match=r"model is an nnx, linen or .* not (list|dict)"):
            gcx.optax.layouts(models, IMAGES)


@pytest.mark.parametrize("make", [OfNnx, OfEquinox])
def test_model_that_needs_no_inputs(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match="needs no example inputs: give the module alone"):
        gcx.optax.layouts(make(), jnp.zeros((2, 3)))


@pytest.mark.parametrize(
    "wrap", [lambda gc: gc, partial(optax.masked, mask={"a": True, "b": False})]
)
def test_parameters_of_another_model(wrap: Callable[[Any], Any]) -> None:
    optimizer = wrap(gcx.optax.centralize(OfNnx()))
    message = r"(?s)nothing to centralize in .*\na .*: the model has no parameter of this name"
    with pytest.raises(ValueError, match=message):
        optimizer.init({"a": jnp.zeros((4, 3)), "b": jnp.zeros((4, 3))})


class Projections(eqx.Module):
    query: Any
    key: Any
    value: Any


def test_a_field_of_equinox_may_be_called_value(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(forget, Projections))
    gcx.optax.register_layer(Projections)(lambda _: dict.fromkeys(("query", "key", "value"), "oi"))
    model = Projections(*jnp.ones((3, 4, 2)))
    assert equinox_axes(model) == dict.fromkeys(("query", "key", "value"), (1,))


def test_a_rule_that_gives_no_layout(request: pytest.FixtureRequest) -> None:
    class Wrong(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.zeros((2, 3)))

    request.addfinalizer(partial(forget, Wrong))
    gcx.optax.register_layer(Wrong)(lambda _: {"w": 5})
    with pytest.raises(TypeError, match=r"^layers/w: a layout is a string .* not int"):
        gcx.optax.layouts(nnx.Dict(layers=Wrong()))


@pytest.mark.parametrize("kind", [nn.Dense, nnx.Linear, eqx.nn.Conv])
def test_class_of_a_layer_is_no_model(kind: type) -> None:
    with pytest.raises(TypeError, match=f"layouts is the class {kind.__name__}"):
        gcx.optax.centralize(kind)


def test_flatten_before_it_is_an_error_with_a_model_too() -> None:
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    for layouts in (model, gcx.optax.layouts(model)):
        optimizer = optax.flatten(gcx.optax.centralize(layouts))
        with pytest.raises(ValueError, match=r"nothing to centralize|matches no parameter"):
            optimizer.init(nnx.state(model, nnx.Param))
