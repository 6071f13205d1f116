"""The fan-in of the layers of Flax, Haiku and Equinox, by autodiff."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import gcx.optax
from gcx.layout import as_layout
from gcx.optax import _models as packages
from gcx.optax._names import named_leaves
from gcx.plan import LeaveAlone

from jax_models import KEY

pytestmark = pytest.mark.usefixtures("compiled_in_haste")


def normal(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), "float32")


class Made(NamedTuple):
    """A layer as its parameters, a function of them, and what gcx reads off it."""

    kind: type
    params: Any
    apply: Callable[..., Any]  # of parameters and inputs
    layouts: dict[str, Any]


def of_linen(layer: Any, *inputs: Any) -> Made:
    params = layer.init(KEY, *inputs)["params"]
    layouts = gcx.optax.layouts(layer, *inputs)
    return Made(type(layer), params, lambda p, *x: layer.apply({"params": p}, *x), layouts)


def of_nnx(make: Any, *inputs: Any) -> Made:
    layer = make(rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def apply(p: Any, *x: Any) -> Any:
        return nnx.merge(graph, p, rest)(*x)

    return Made(type(layer), params, apply, gcx.optax.layouts(layer))


def of_equinox(make: Any, *inputs: Any) -> Made:
    layer = make(key=KEY)
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def apply(p: Any, *x: Any) -> Any:
        return jax.vmap(eqx.combine(p, static))(*x)

    return Made(type(layer), params, apply, gcx.optax.layouts(layer))


def of_haiku(make: Any, *inputs: Any) -> Made:
    kinds = set()

    def call(*inputs: Any) -> Any:
        layer = make()  # Haiku wants its modules made in here
        kinds.add(type(layer))
        return layer(*inputs)

    model = hk.without_apply_rng(hk.transform(call))
    params = model.init(KEY, *inputs)
    (kind,) = kinds
    return Made(kind, params, model.apply, gcx.optax.layouts(model, *inputs))


class Case(NamedTuple):
    framework: Callable[..., Made]
    make: Callable[..., Any]
    inputs: tuple[Any, ...]
    weight: str
    # The axes of the output that tell outputs apart; over the others it is summed.
    outputs: tuple[int, ...] = (-1,)
    # How many units of the weight enter into one output: more than one where gates are stacked.
    units: int = 1
    # Parameters that are not random.
    fixed: tuple[tuple[str, Any], ...] = ()


def case(
    framework: Any, usual: str, make: Any, *inputs: Any, weight: str = "", **told: Any
) -> Case:
    return Case(framework, make, inputs, weight or usual, **told)


linen, in_nnx = partial(case, of_linen, "kernel"), partial(case, of_nnx, "kernel")
equinox, haiku = partial(case, of_equinox, "weight"), partial(case, of_haiku)
FLAT, IMAGE, CHANNELS_FIRST = normal(3, 5), normal(2, 7, 7, 4), normal(2, 4, 7, 7)
HEADS, STATE = normal(3, 2, 5), normal(3, 4)


BOXED = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
LINEN = {
    "Dense": linen(nn.Dense(4), FLAT),
    "Dense of one": linen(nn.Dense(1), FLAT),
    "Dense, partitioned": linen(nn.Dense(3, kernel_init=BOXED), FLAT),
    "DenseGeneral": linen(nn.DenseGeneral((2, 3)), FLAT, outputs=(-2, -1)),
    "DenseGeneral of heads": linen(nn.DenseGeneral(4, axis=(-2, -1)), HEADS),
    "DenseGeneral of a batch": linen(nn.DenseGeneral(4, batch_dims=(0,)), HEADS, outputs=(0, 2)),
    "Einsum": linen(nn.Einsum((5, 2, 3), "bi,iok->bok"), FLAT, outputs=(1, 2)),
    "Einsum of a matrix": linen(nn.Einsum((5, 3), "bi,io->bo"), FLAT),
    "Einsum of experts": linen(nn.Einsum((2, 5, 3), "bei,eio->beo"), HEADS, outputs=(1, 2)),
    "Conv": linen(nn.Conv(3, (3, 2)), IMAGE),
    "Conv 1d": linen(nn.Conv(3, (2,), padding="VALID"), HEADS),
    "Conv grouped": linen(nn.Conv(6, (3, 3), feature_group_count=2), IMAGE),
    "Conv depthwise": linen(nn.Conv(8, (3, 3), feature_group_count=4), IMAGE),
    "ConvTranspose": linen(nn.ConvTranspose(3, (3, 2)), IMAGE),
    "ConvTranspose(transpose_kernel)": linen(
        nn.ConvTranspose(3, (3, 2), transpose_kernel=True), IMAGE
    ),
    "ConvLocal": linen(
        nn.ConvLocal(3, (2, 2), padding="VALID"), normal(2, 3, 4, 2), outputs=(1, 2, 3)
    ),
    "DenseParams": linen(nn.OptimizedLSTMCell(4), (STATE, STATE), FLAT, weight="ig/kernel"),
    "WeightNorm": linen(nn.WeightNorm(nn.Dense(4)), FLAT, weight="layer_instance/kernel"),
    "GRUCell": linen(nn.GRUCell(4), STATE, FLAT, weight="in/kernel"),
}

NNX = {
    "Linear": in_nnx(partial(nnx.Linear, 5, 4), FLAT),
    "LinearGeneral": in_nnx(partial(nnx.LinearGeneral, 5, (2, 3)), FLAT, outputs=(-2, -1)),
    "LinearGeneral of heads": in_nnx(partial(nnx.LinearGeneral, (2, 5), 4, axis=(-2, -1)), HEADS),
    "LinearGeneral of a batch": in_nnx(
        partial(nnx.LinearGeneral, 5, 4, batch_axis={0: 3}), HEADS, outputs=(0, 2)
    ),
    "Einsum": in_nnx(partial(nnx.Einsum, "bei,eio->beo", (2, 5, 3)), HEADS, outputs=(1, 2)),
    "Conv": in_nnx(partial(nnx.Conv, 4, 3, (3, 2)), IMAGE),
    "Conv depthwise": in_nnx(partial(nnx.Conv, 4, 8, (3, 3), feature_group_count=4), IMAGE),
    "ConvTranspose": in_nnx(partial(nnx.ConvTranspose, 4, 3, (3, 2)), IMAGE),
    "ConvTranspose(transpose_kernel)": in_nnx(
        partial(nnx.ConvTranspose, 4, 3, (3, 2), transpose_kernel=True), IMAGE
    ),
    "LoRA b": in_nnx(partial(nnx.LoRA, 5, 2, 4), FLAT, weight="lora_b"),
    "LoRALinear": in_nnx(partial(nnx.LoRALinear, 5, 4, lora_rank=2), FLAT),
}

CONV, UP = eqx.nn.Conv2d, eqx.nn.ConvTranspose2d
GRU, LSTM = partial(eqx.nn.GRUCell, 5, 4), partial(eqx.nn.LSTMCell, 5, 4)
LSTM_STATE = (STATE, STATE)
EQUINOX = {
    "Linear": equinox(partial(eqx.nn.Linear, 5, 4), FLAT),
    "Linear to a scalar": equinox(partial(eqx.nn.Linear, 5, "scalar"), FLAT, outputs=()),
    "Conv": equinox(partial(CONV, 4, 3, (3, 2)), CHANNELS_FIRST, outputs=(1,)),
    "Conv grouped": equinox(partial(CONV, 4, 6, 3, groups=2), CHANNELS_FIRST, outputs=(1,)),
    "ConvTranspose": equinox(partial(UP, 4, 3, (3, 2)), CHANNELS_FIRST, outputs=(1,)),
    "ConvTranspose grouped": equinox(partial(UP, 4, 6, 3, groups=2), CHANNELS_FIRST, outputs=(1,)),
    "GRUCell, input": equinox(GRU, FLAT, STATE, weight="weight_ih", units=3),
    "GRUCell, state": equinox(GRU, FLAT, STATE, weight="weight_hh", units=3),
    "LSTMCell, input": equinox(LSTM, FLAT, LSTM_STATE, weight="weight_ih", units=4),
    "LSTMCell, state": equinox(LSTM, FLAT, LSTM_STATE, weight="weight_hh", units=4),
}

# The reset gate comes before the product with w_h, which is not to mix the units here.
RESET = (("gru/w_h", jnp.tile(jnp.eye(4), 3)),)


def in_a_transpose_block() -> Any:
    with hk.name_scope("conv_transpose_block"):
        return hk.Conv2D(3, 3)


HAIKU = {
    "Linear": haiku("linear/w", lambda: hk.Linear(4), FLAT),
    "Conv2D": haiku("conv2_d/w", lambda: hk.Conv2D(3, (3, 2)), IMAGE),
    "Conv2D grouped": haiku("conv2_d/w", lambda: hk.Conv2D(6, 3, feature_group_count=2), IMAGE),
    "Conv2D, channels first": haiku(
        "conv2_d/w", lambda: hk.Conv2D(3, 3, data_format="NCHW"), CHANNELS_FIRST, outputs=(1,)
    ),
    "Conv2D in a transpose block": haiku(
        "conv_transpose_block/conv2_d/w", in_a_transpose_block, IMAGE
    ),
    "Conv2DTranspose": haiku("conv2_d_transpose/w", lambda: hk.Conv2DTranspose(3, 3), IMAGE),
    "DepthwiseConv2D": haiku("depthwise_conv2_d/w", lambda: hk.DepthwiseConv2D(2, 3), IMAGE),
    "GRU, input": haiku("gru/w_i", lambda: hk.GRU(4), FLAT, STATE, units=3, fixed=RESET),
    "GRU, state": haiku("gru/w_h", lambda: hk.GRU(4), FLAT, STATE, units=3, fixed=RESET),
}


TABLES = {"linen": LINEN, "nnx": NNX, "equinox": EQUINOX, "haiku": HAIKU}
CASES = {
    f"{framework}: {name}": case
    for framework, cases in TABLES.items()
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


# Cases whose names and ranks are enough for a preset.
BY_PRESET = {
    "linen": "Dense|Dense of one|Dense, partitioned|DenseGeneral of heads"
    "|Einsum of a matrix|Conv|Conv 1d|Conv grouped|Conv depthwise|ConvTranspose",
    "nnx": "Linear|Conv",
    "haiku": "Linear|Conv2D grouped|Conv2D in a transpose block|Conv2DTranspose|DepthwiseConv2D",
    "equinox": "Linear|Conv|Conv grouped|ConvTranspose grouped",
}


@cache
def made_of(name: str) -> Made:
    case = CASES[name]
    return case.framework(case.make, *case.inputs)


@pytest.mark.parametrize("name", CASES)
def test_declared_fan_in_is_what_autodiff_sees(name: str) -> None:
    """An output depends on all elements of its own output units, and on no others."""
    case, made = CASES[name], made_of(name)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), made.params)
    params = with_leaves(params, dict(case.fixed))
    weight = dict(named_leaves(params))[case.weight]

    def outputs(weight: Any) -> Any:
        changed = with_leaves(params, {case.weight: weight})
        return numbered_outputs(case, made.apply(changed, *case.inputs))

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
    framework, _, short_name = name.partition(": ")
    if short_name in BY_PRESET[framework].split("|"):
        preset = "flax" if framework in ("linen", "nnx") else framework
        guess = gcx.optax.plan(made.params, preset)[case.weight]
        np.testing.assert_array_equal(units_of(guess.layout, weight.shape), units)


def test_the_first_half_of_lora_is_a_layer_of_its_own() -> None:
    # Each output of the whole sees all of it, so it is looked at where the second half starts.
    x, layer = FLAT, nnx.LoRA(5, 2, 4, rngs=nnx.Rngs(0))
    gradient = jax.jacobian(lambda a: (x @ a).sum(0))(layer.lora_a[...])
    units = units_of(gcx.optax.layouts(layer)["lora_a"], (5, 2))
    for k in range(2):
        np.testing.assert_array_equal(np.asarray(gradient[k]) != 0, units == k)


def test_every_rule_is_that_of_a_class_and_checked_if_it_has_a_fan_in() -> None:
    modules = (nn, nn.recurrent, nnx, eqx.nn, hk)
    values = [value for module in modules for value in vars(module).values()]
    bases = [base for value in values if isinstance(value, type) for base in value.__mro__]
    checked = [base for name in CASES for base in made_of(name).kind.__mro__]
    checked.append(nn.recurrent.DenseParams)  # within the OptimizedLSTMCell
    names = [{f"{k.__module__}.{k.__qualname__}" for k in kinds} for kinds in (bases, checked)]
    tables = (package.RULES for package in (packages.equinox, packages.flax, packages.haiku))
    for pattern, rule in [rule for table in tables for rule in table.items()]:
        # A function is there since it may give a layout.
        has_fan_in = callable(rule) or not all(isinstance(x, LeaveAlone) for x in rule.values())
        for known in names if has_fan_in else names[:1]:
            assert any(fnmatchcase(name, pattern) for name in known), pattern
