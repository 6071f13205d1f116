"""The fan-in of the layers of Flax, Haiku, Equinox and Keras, by autodiff and in training."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache, partial
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
import optax
from flax import linen as nn
from flax import nnx

import gcx.optax
from gcx.layout import as_layout
from gcx.optax._models import RULES
from gcx.optax._names import named_leaves
from gcx.plan import LeaveAlone

from optax_training import train

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

jax.config.update("jax_enable_x64", True)  # as tests/libraries.py does

KEY = jax.random.key(0)


def normal(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), "float32")


class Made(NamedTuple):
    """A layer as its parameters, a function of them, and what gcx reads off it."""

    kind: type
    params: Any
    apply: Callable[..., Any]  # of parameters and inputs
    layouts: dict[str, Any]


def of_linen(make: Any, *inputs: Any) -> Made:
    layer = make()
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


def of_keras(make: Any, x: Any) -> Made:
    """Written by hand, with the names that Keras gives."""
    name, weight, call = make()
    layouts = {row.name: row.layout for row in gcx.optax.plan({name: weight}, "keras")}
    return Made(object, {name: weight}, lambda p, x: call(x, p[name]), layouts)


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


def linen(make: Any, *inputs: Any, weight: str = "kernel", **told: Any) -> Case:
    return Case(of_linen, make, inputs, weight, **told)


def in_nnx(make: Any, *inputs: Any, weight: str = "kernel", **told: Any) -> Case:
    return Case(of_nnx, make, inputs, weight, **told)


def equinox(make: Any, *inputs: Any, weight: str = "weight", **told: Any) -> Case:
    return Case(of_equinox, make, inputs, weight, **told)


def haiku(weight: str, make: Any, *inputs: Any, **told: Any) -> Case:
    return Case(of_haiku, make, inputs, weight, **told)


def keras(weight: str, shape: tuple[int, ...], call: Any, *inputs: Any) -> Case:
    return Case(of_keras, lambda: (weight, normal(*shape), call), inputs, weight)


FLAT, IMAGE, CHANNELS_FIRST = normal(3, 5), normal(2, 7, 7, 4), normal(2, 4, 7, 7)
HEADS, STATE = normal(3, 2, 5), normal(3, 4)


class Projection(nn.Module):
    """Of attention, under its name there."""

    called: str
    features: Any
    axis: Any = -1

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.DenseGeneral(self.features, axis=self.axis, name=self.called)(x)


def partitioned() -> Any:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    return nn.Dense(3, kernel_init=init)


LINEN = {
    "Dense": linen(lambda: nn.Dense(4), FLAT),
    "Dense of one": linen(lambda: nn.Dense(1), FLAT),
    "Dense, partitioned": linen(partitioned, FLAT),
    "DenseGeneral": linen(lambda: nn.DenseGeneral((2, 3)), FLAT, outputs=(-2, -1)),
    "DenseGeneral of heads": linen(lambda: nn.DenseGeneral(4, axis=(-2, -1)), HEADS),
    "DenseGeneral of a batch": linen(
        lambda: nn.DenseGeneral(4, batch_dims=(0,)), HEADS, outputs=(0, 2)
    ),
    "query": linen(
        lambda: Projection("query", (2, 3)), FLAT, weight="query/kernel", outputs=(-2, -1)
    ),
    "output of attention": linen(
        lambda: Projection("out", 3, (-2, -1)), HEADS, weight="out/kernel"
    ),
    "Einsum": linen(lambda: nn.Einsum((5, 2, 3), "bi,iok->bok"), FLAT, outputs=(1, 2)),
    "Einsum of a matrix": linen(lambda: nn.Einsum((5, 3), "bi,io->bo"), FLAT),
    "Einsum of experts": linen(lambda: nn.Einsum((2, 5, 3), "bei,eio->beo"), HEADS, outputs=(1, 2)),
    "Conv": linen(lambda: nn.Conv(3, (3, 2)), IMAGE),
    "Conv 1d": linen(lambda: nn.Conv(3, (2,), padding="VALID"), HEADS),
    "Conv grouped": linen(lambda: nn.Conv(6, (3, 3), feature_group_count=2), IMAGE),
    "Conv depthwise": linen(lambda: nn.Conv(8, (3, 3), feature_group_count=4), IMAGE),
    "ConvTranspose": linen(lambda: nn.ConvTranspose(3, (3, 2)), IMAGE),
    "ConvTranspose(transpose_kernel)": linen(
        lambda: nn.ConvTranspose(3, (3, 2), transpose_kernel=True), IMAGE
    ),
    "ConvLocal": linen(
        lambda: nn.ConvLocal(3, (2, 2), padding="VALID"), normal(2, 3, 4, 2), outputs=(1, 2, 3)
    ),
    "DenseParams": linen(lambda: nn.OptimizedLSTMCell(4), (STATE, STATE), FLAT, weight="ig/kernel"),
    "WeightNorm": linen(lambda: nn.WeightNorm(nn.Dense(4)), FLAT, weight="layer_instance/kernel"),
    "GRUCell": linen(lambda: nn.GRUCell(4), STATE, FLAT, weight="in/kernel"),
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
        "conv2_d/w",
        lambda: hk.Conv2D(3, 3, data_format="NCHW"),
        CHANNELS_FIRST,
        outputs=(1,),
    ),
    "Conv2D in a transpose block": haiku(
        "conv_transpose_block/conv2_d/w", in_a_transpose_block, IMAGE
    ),
    "Conv2DTranspose": haiku("conv2_d_transpose/w", lambda: hk.Conv2DTranspose(3, 3), IMAGE),
    "DepthwiseConv2D": haiku("depthwise_conv2_d/w", lambda: hk.DepthwiseConv2D(2, 3), IMAGE),
    "GRU, input": haiku("gru/w_i", lambda: hk.GRU(4), FLAT, STATE, units=3, fixed=RESET),
    "GRU, state": haiku("gru/w_h", lambda: hk.GRU(4), FLAT, STATE, units=3, fixed=RESET),
}


def transposed(x: Any, w: Any) -> Any:
    return jax.lax.conv_transpose(x, jnp.swapaxes(w, -1, -2), (1, 1), "VALID")


def depthwise(x: Any, w: Any) -> Any:
    options: Any = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 4}
    kernel = w.reshape(3, 3, 1, 8)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", **options)


KERAS = {
    "Conv2DTranspose": keras("conv2d_transpose/kernel", (3, 3, 3, 4), transposed, IMAGE),
    "DepthwiseConv2D": keras("depthwise_conv2d/kernel", (3, 3, 4, 2), depthwise, IMAGE),
}

TABLES = {"linen": LINEN, "nnx": NNX, "equinox": EQUINOX, "haiku": HAIKU, "keras": KERAS}
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


# Those whose names and ranks are enough for a preset.
BY_PRESET = {
    "linen": "Dense|Dense of one|Dense, partitioned|DenseGeneral of heads|query|output of attention"
    "|Einsum of a matrix|Conv|Conv 1d|Conv grouped|Conv depthwise|ConvTranspose",
    "nnx": "Linear|Conv",
    "haiku": "Linear|Conv2D grouped|Conv2D in a transpose block|Conv2DTranspose|DepthwiseConv2D",
    "equinox": "Linear|Conv|Conv grouped|ConvTranspose grouped",
    "keras": "Conv2DTranspose|DepthwiseConv2D",
}


@pytest.mark.parametrize(
    ("framework", "name"),
    [(framework, name) for framework, names in BY_PRESET.items() for name in names.split("|")],
)
def test_answer_to_a_shift_of_the_input_is_never_unlearned(framework: str, name: str) -> None:
    # w^T x - w^T (x + shift 1) = -shift 1^T w with 1^T w = 1^T w0: Corollary 4.1 without any axes.
    case, made = TABLES[framework][name], made_of(f"{framework}: {name}")
    preset = "flax" if framework in ("linen", "nnx") else framework
    x = case.inputs[0].astype("float64")
    start = jax.tree.map(lambda leaf: leaf.astype("float64"), made.params)
    target = normal(*made.apply(start, x).shape)
    spatial = slice(2, -2)  # the outputs that see the whole kernel, and not the padding
    inner: Any = ...
    if target.ndim == 4:
        inner = (..., spatial, spatial) if case.outputs == (1,) else (slice(None), spatial, spatial)

    def loss(params: Any) -> Any:
        return jnp.mean((made.apply(params, x) - target) ** 2)

    def answer(params: Any) -> Any:
        return (made.apply(params, x + 3.0) - made.apply(params, x))[inner]

    optimizer = optax.chain(gcx.optax.centralize(preset), optax.sgd(0.1, momentum=0.9))
    end = train(optimizer, loss, start)
    assert loss(end) < loss(start)
    np.testing.assert_allclose(answer(end), answer(start), atol=1e-12)
    plain = train(optax.sgd(0.1, momentum=0.9), loss, start)
    assert np.abs(answer(plain) - answer(start)).max() > 1e-2


def test_the_first_half_of_lora_is_a_layer_of_its_own() -> None:
    # Each output of the whole sees all of it, so it is looked at where the second half starts.
    x, layer = FLAT, nnx.LoRA(5, 2, 4, rngs=nnx.Rngs(0))
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
