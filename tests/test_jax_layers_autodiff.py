"""What the layers of Flax, Haiku and Equinox declare, checked against autodiff."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

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
from flax import linen as nn
from flax import nnx

import gcx.optax
from gcx.layout import as_layout
from gcx.optax._models import RULES
from gcx.optax._names import named_leaves
from gcx.plan import LeaveAlone

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

KEY = jax.random.key(0)


def normal(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), "float32")


class Made(NamedTuple):
    """A layer as its parameters, a function of them, and what gcx reads off it."""

    kind: type
    params: Any
    apply: Callable[[Any], Any]
    layouts: dict[str, Any]


def of_linen(layer: Any, *inputs: Any) -> Made:
    params = layer.init(KEY, *inputs)["params"]
    layouts = gcx.optax.layouts(layer, *inputs)
    return Made(type(layer), params, lambda p: layer.apply({"params": p}, *inputs), layouts)


def of_nnx(layer: Any, *inputs: Any) -> Made:
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def apply(p: Any) -> Any:
        return nnx.merge(graph, p, rest)(*inputs)

    return Made(type(layer), params, apply, gcx.optax.layouts(layer))


def of_equinox(layer: Any, *inputs: Any) -> Made:
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def apply(p: Any) -> Any:
        return jax.vmap(eqx.combine(p, static))(*inputs)

    return Made(type(layer), params, apply, gcx.optax.layouts(layer))


def of_haiku(kind: type, options: dict[str, Any], *inputs: Any) -> Made:
    def call(*inputs: Any) -> Any:
        return kind(**options, name="layer")(*inputs)  # Haiku wants its modules made in here

    model = hk.without_apply_rng(hk.transform(call))
    params = model.init(KEY, *inputs)
    layouts = gcx.optax.layouts(model, *inputs)
    return Made(kind, params, lambda p: model.apply(p, *inputs), layouts)


class Case(NamedTuple):
    make: Callable[[], Made]
    weight: str
    # The axes of the output that tell outputs apart; over the others it is summed.
    outputs: tuple[int, ...] = (-1,)
    # How many units of the weight enter into one output: more than one where gates are stacked.
    units: int = 1
    # Parameters that are not random.
    fixed: tuple[tuple[str, Any], ...] = ()


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


FLAT, IMAGE, CHANNELS_FIRST = normal(3, 5), normal(2, 6, 6, 4), normal(2, 4, 6, 6)
HEADS, STATE = normal(3, 2, 5), normal(3, 4)

LINEN = {
    "Dense": Case(lambda: of_linen(nn.Dense(4), FLAT), "kernel"),
    "DenseGeneral": Case(
        lambda: of_linen(nn.DenseGeneral((2, 3)), FLAT), "kernel", outputs=(-2, -1)
    ),
    "DenseGeneral of heads": Case(
        lambda: of_linen(nn.DenseGeneral(4, axis=(-2, -1)), HEADS), "kernel"
    ),
    "DenseGeneral of a batch": Case(
        lambda: of_linen(nn.DenseGeneral(4, batch_dims=(0,)), HEADS), "kernel", outputs=(0, 2)
    ),
    "Einsum": Case(lambda: of_linen(nn.Einsum((5, 2, 3), "bi,iok->bok"), FLAT), "kernel", (1, 2)),
    "Einsum of experts": Case(
        lambda: of_linen(nn.Einsum((2, 5, 3), "bei,eio->beo"), HEADS), "kernel", (1, 2)
    ),
    "Conv": Case(lambda: of_linen(nn.Conv(3, (3, 2)), IMAGE), "kernel"),
    "Conv 1d": Case(lambda: of_linen(nn.Conv(3, (2,)), HEADS), "kernel"),
    "Conv grouped": Case(
        lambda: of_linen(nn.Conv(6, (3, 3), feature_group_count=2), IMAGE), "kernel"
    ),
    "Conv depthwise": Case(
        lambda: of_linen(nn.Conv(8, (3, 3), feature_group_count=4), IMAGE), "kernel"
    ),
    "ConvTranspose": Case(lambda: of_linen(nn.ConvTranspose(3, (3, 2)), IMAGE), "kernel"),
    "ConvTranspose(transpose_kernel)": Case(
        lambda: of_linen(nn.ConvTranspose(3, (3, 2), transpose_kernel=True), IMAGE), "kernel"
    ),
    "ConvLocal": Case(
        lambda: of_linen(nn.ConvLocal(3, (2, 2), padding="VALID"), normal(2, 3, 4, 2)),
        "kernel",
        outputs=(1, 2, 3),
    ),
    "DenseParams": Case(
        lambda: of_linen(nn.OptimizedLSTMCell(4), (STATE, STATE), FLAT), "ig/kernel"
    ),
    "WeightNorm": Case(lambda: of_linen(nn.WeightNorm(nn.Dense(4)), FLAT), "layer_instance/kernel"),
    "GRUCell": Case(lambda: of_linen(nn.GRUCell(4), STATE, FLAT), "in/kernel"),
}

NNX = {
    "Linear": Case(lambda: of_nnx(nnx.Linear(5, 4, rngs=rngs()), FLAT), "kernel"),
    "LinearGeneral": Case(
        lambda: of_nnx(nnx.LinearGeneral(5, (2, 3), rngs=rngs()), FLAT), "kernel", (-2, -1)
    ),
    "LinearGeneral of heads": Case(
        lambda: of_nnx(nnx.LinearGeneral((2, 5), 4, axis=(-2, -1), rngs=rngs()), HEADS), "kernel"
    ),
    "LinearGeneral of a batch": Case(
        lambda: of_nnx(nnx.LinearGeneral(5, 4, batch_axis={0: 3}, rngs=rngs()), HEADS),
        "kernel",
        outputs=(0, 2),
    ),
    "Einsum": Case(
        lambda: of_nnx(nnx.Einsum("bei,eio->beo", (2, 5, 3), rngs=rngs()), HEADS), "kernel", (1, 2)
    ),
    "Conv": Case(lambda: of_nnx(nnx.Conv(4, 3, (3, 2), rngs=rngs()), IMAGE), "kernel"),
    "Conv depthwise": Case(
        lambda: of_nnx(nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=rngs()), IMAGE), "kernel"
    ),
    "ConvTranspose": Case(
        lambda: of_nnx(nnx.ConvTranspose(4, 3, (3, 2), rngs=rngs()), IMAGE), "kernel"
    ),
    "ConvTranspose(transpose_kernel)": Case(
        lambda: of_nnx(nnx.ConvTranspose(4, 3, (3, 2), transpose_kernel=True, rngs=rngs()), IMAGE),
        "kernel",
    ),
    "LoRA b": Case(lambda: of_nnx(nnx.LoRA(5, 2, 4, rngs=rngs()), FLAT), "lora_b"),
    "LoRALinear": Case(
        lambda: of_nnx(nnx.LoRALinear(5, 4, lora_rank=2, rngs=rngs()), FLAT), "kernel"
    ),
}

EQUINOX = {
    "Linear": Case(lambda: of_equinox(eqx.nn.Linear(5, 4, key=KEY), FLAT), "weight"),
    "Linear to a scalar": Case(
        lambda: of_equinox(eqx.nn.Linear(5, "scalar", key=KEY), FLAT), "weight", outputs=()
    ),
    "Conv": Case(
        lambda: of_equinox(eqx.nn.Conv2d(4, 3, (3, 2), key=KEY), CHANNELS_FIRST), "weight", (1,)
    ),
    "Conv grouped": Case(
        lambda: of_equinox(eqx.nn.Conv2d(4, 6, 3, groups=2, key=KEY), CHANNELS_FIRST),
        "weight",
        outputs=(1,),
    ),
    "ConvTranspose": Case(
        lambda: of_equinox(eqx.nn.ConvTranspose2d(4, 3, (3, 2), key=KEY), CHANNELS_FIRST),
        "weight",
        outputs=(1,),
    ),
    "ConvTranspose grouped": Case(
        lambda: of_equinox(eqx.nn.ConvTranspose2d(4, 6, 3, groups=2, key=KEY), CHANNELS_FIRST),
        "weight",
        outputs=(1,),
    ),
    "GRUCell, input": Case(
        lambda: of_equinox(eqx.nn.GRUCell(5, 4, key=KEY), FLAT, STATE), "weight_ih", units=3
    ),
    "GRUCell, state": Case(
        lambda: of_equinox(eqx.nn.GRUCell(5, 4, key=KEY), FLAT, STATE), "weight_hh", units=3
    ),
    "LSTMCell, input": Case(
        lambda: of_equinox(eqx.nn.LSTMCell(5, 4, key=KEY), FLAT, (STATE, STATE)),
        "weight_ih",
        units=4,
    ),
    "LSTMCell, state": Case(
        lambda: of_equinox(eqx.nn.LSTMCell(5, 4, key=KEY), FLAT, (STATE, STATE)),
        "weight_hh",
        units=4,
    ),
}


def gated(weight: str) -> Case:
    # Its reset gate comes before the product with w_h, which is not to mix the units here.
    fixed = (("layer/w_h", jnp.tile(jnp.eye(4), 3)),)
    return Case(
        lambda: of_haiku(hk.GRU, {"hidden_size": 4}, FLAT, STATE),
        f"layer/{weight}",
        units=3,
        fixed=fixed,
    )


HAIKU = {
    "Linear": Case(lambda: of_haiku(hk.Linear, {"output_size": 4}, FLAT), "layer/w"),
    "Conv2D": Case(
        lambda: of_haiku(hk.Conv2D, {"output_channels": 3, "kernel_shape": (3, 2)}, IMAGE),
        "layer/w",
    ),
    "Conv2D grouped": Case(
        lambda: of_haiku(
            hk.Conv2D,
            {"output_channels": 6, "kernel_shape": 3, "feature_group_count": 2},
            IMAGE,
        ),
        "layer/w",
    ),
    "Conv2D, channels first": Case(
        lambda: of_haiku(
            hk.Conv2D,
            {"output_channels": 3, "kernel_shape": 3, "data_format": "NCHW"},
            CHANNELS_FIRST,
        ),
        "layer/w",
        outputs=(1,),
    ),
    "Conv2DTranspose": Case(
        lambda: of_haiku(hk.Conv2DTranspose, {"output_channels": 3, "kernel_shape": 3}, IMAGE),
        "layer/w",
    ),
    "DepthwiseConv2D": Case(
        lambda: of_haiku(hk.DepthwiseConv2D, {"channel_multiplier": 2, "kernel_shape": 3}, IMAGE),
        "layer/w",
    ),
    "GRU, input": gated("w_i"),
    "GRU, state": gated("w_h"),
}

CASES = {
    f"{framework}: {name}": case
    for framework, cases in (
        ("linen", LINEN),
        ("nnx", NNX),
        ("equinox", EQUINOX),
        ("haiku", HAIKU),
    )
    for name, case in cases.items()
}


def numbered_outputs(case: Case, value: Any) -> Any:
    """One number for each output: the others of its axes are summed over."""
    output = value[0] if isinstance(value, tuple) else value
    if isinstance(output, tuple):  # the carry of a recurrent cell of Flax: the new hidden state
        output = output[-1]
    kept = {axis % output.ndim for axis in case.outputs}
    return output.sum([axis for axis in range(output.ndim) if axis not in kept]).reshape(-1)


def with_leaves(params: Any, new: dict[str, Any]) -> Any:
    leaves = [new.get(name, leaf) for name, leaf in named_leaves(params) if leaf is not None]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def units_of(layout: Any, shape: tuple[int, ...]) -> Any:
    """Number each element of a weight by its output unit, as the layout says."""
    fan_in = as_layout(layout).fan_in_axes(len(shape))
    kept = [1 if axis in fan_in else n for axis, n in enumerate(shape)]
    return np.broadcast_to(np.arange(np.prod(kept)).reshape(kept), shape)


@cache
def made_of(name: str) -> Made:
    return CASES[name].make()


@pytest.mark.parametrize("name", CASES)
def test_declared_fan_in_is_what_autodiff_sees(name: str) -> None:
    """An output depends on all elements of its own output units, and on no others."""
    case, made = CASES[name], made_of(name)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), made.params)
    params = with_leaves(params, dict(case.fixed))
    weight = dict(named_leaves(params))[case.weight]

    def outputs(weight: Any) -> Any:
        return numbered_outputs(case, made.apply(with_leaves(params, {case.weight: weight})))

    units = units_of(made.layouts[case.weight], weight.shape)
    seen: set[int] = set()
    for gradient in np.asarray(jax.jit(jax.jacobian(outputs))(weight)):
        depends = gradient != 0
        touched = set(units[depends].tolist())
        assert len(touched) == case.units
        assert depends[np.isin(units, sorted(touched))].all()
        assert not touched & seen
        seen |= touched
    assert seen == set(units.flat)


def test_the_first_half_of_lora_is_a_layer_of_its_own() -> None:
    # Each output of the whole sees all of it, so it is looked at where the second half starts.
    x, layer = FLAT, nnx.LoRA(5, 2, 4, rngs=rngs())
    gradient = jax.jacobian(lambda a: (x @ a).sum(0))(layer.lora_a[...])
    units = units_of(gcx.optax.layouts(layer)["lora_a"], (5, 2))
    for k in range(2):
        np.testing.assert_array_equal(np.asarray(gradient[k]) != 0, units == k)


def has_fan_in(rule: Any) -> bool:
    """Whether a rule gives a layout; a function is there since it may."""
    return callable(rule) or not all(isinstance(said, LeaveAlone) for said in rule.values())


def qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def test_every_rule_with_a_fan_in_is_checked() -> None:
    patterns = [name for name, rule in RULES._by_name.items() if has_fan_in(rule)]
    bases = {qualified(base) for name in CASES for base in made_of(name).kind.__mro__}
    bases |= {qualified(nn.recurrent.DenseParams)}  # within the OptimizedLSTMCell
    unchecked = [p for p in patterns if not any(fnmatchcase(base, p) for base in bases)]
    assert unchecked == []


def test_every_rule_is_that_of_a_class() -> None:
    modules = (nn, nn.recurrent, nnx, eqx.nn, hk)
    values = [value for module in modules for value in vars(module).values()]
    classes = {qualified(value) for value in values if isinstance(value, type)}
    classes |= {
        qualified(base) for value in values if isinstance(value, type) for base in value.__mro__
    }
    for pattern in RULES._by_name:
        assert any(fnmatchcase(name, pattern) for name in classes), pattern
