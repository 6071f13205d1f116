"""gcx.optax before training: names, presets, the plan that it prints, and errors."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gcx.optax
from gcx import Layout
from gcx.plan import LeaveAlone, Plan, PlanRow

from optax_training import FIRST_ONLY, KERNELS, normal, normal_like, struct
from reference import centralized


class Boxed(NamedTuple):
    value: Any


NODES = {
    "DictKey": ({"weight": struct(3, 2)}, "weight"),
    "SequenceKey": ([struct(3, 2)], "0"),
    "no key": (struct(3, 2), ""),
    "a field called value": ({"a": Boxed(struct(3, 2))}, "a/value"),
    "keys called value": ({"value": {"value": struct(3, 2)}}, "value/value"),
}


@pytest.mark.parametrize(("node", "name"), NODES.values(), ids=NODES)
def test_every_kind_of_key_makes_a_name(node: Any, name: str) -> None:
    assert gcx.optax.plan(node, {name: "o..."})[0][:3] == (name, (3, 2), Layout("o..."))


# --- presets --------------------------------------------------------------------------------------

# Names as the packages make them, by their axes: i is fan-in; x is left alone.
# What neither name nor rank can tell is not guessed.
NAMES: dict[str, dict[str, str]] = {
    "flax": {
        "": "PReLU_0/negative_slope",
        "io": "kernel params/Dense_0/kernel layer_instance/kernel DenseGeneral_0/kernel "
        "Scanner_0/Dense_0/kernel bert/self/query/kernel RNN_0/cell/hf/kernel GRUCell_0/in/kernel "
        "head/layers/0/kernel cell/dense_h/kernel",
        "iio": "MultiHeadDotProductAttention_0/out/kernel",
        "ioo": "MultiHeadDotProductAttention_0/query/kernel "
        "MultiHeadDotProductAttention_0/key/kernel MultiHeadDotProductAttention_0/value/kernel",
        "iiio": "Conv_0/kernel ConvLSTMCell_0/hh/kernel embedding/kernel",
        "x": "layer_instance/kernel/scale LayerNorm_0/scale",
        "xx": "MultiHeadDotProductAttention_0/query/bias Embed_0/embedding lora/lora_a "
        "Einsum_0/kernel",
        "xxx": "pos_embedding DenseGeneral_0/kernel Einsum_0/kernel ScanDense_0/kernel "
        "VmapBlock_0/Dense_0/kernel",
        "xxxx": "ConvTranspose_0/kernel ConvLocal_0/kernel",
    },
    "haiku": {
        "io": "w mlp/~/linear_0/w multi_head_attention/query/w multi_head_attention/linear/w "
        "lstm/linear/w gru/w_h gru/w_i",
        "iio": "conv1_d/w",
        "ioi": "conv1_d_transpose/w",
        "oio": "__layer_stack_no_per_layer/linear/w __layer_stack_with_per_layer_1/block/gru/w_h",
        "iiio": "conv2_d/w conv_transpose_block/conv2_d/w depthwise_conv2_d/w "
        "conv2_dlstm/hidden_to_hidden/w",
        "iioi": "conv2_d_transpose_1/w conv_nd_transpose/w",
        "iiioi": "conv3_d_transpose/w",
        "oiioi": "__layer_stack_no_per_layer/conv2_d_transpose/w",
        "xx": "__layer_stack_no_per_layer/linear/b embed/embeddings vq/pos_table batch_norm/scale "
        "batch_norm/offset",
        "xxx": "bias/b",
    },
    "equinox": {
        "oi": "weight layers/0/weight normalized_mlp/layers/0/weight attention/query_proj/weight "
        "cell/weight_ih cell/weight_hh patch_embedding/linear/weight",
        "oii": "layers/2/weight",
        "oiii": "conv/weight conv_transpose/weight",
        "x": "cell/bias_n",
        "xx": "token_embedder/weight embedding/weight norm1/weight layernorm/bias dense/g "
        "cls_token",
        "xxx": "conv/bias",
    },
}
PARAMETERS: list[tuple[str, str, tuple[int, ...], tuple[int, ...] | None]] = [
    (preset, name, tuple(range(2, 2 + len(letters))), fan_in or None)
    for preset, groups in NAMES.items()
    for letters, names in groups.items()
    for fan_in in [tuple(k for k, letter in enumerate(letters) if letter == "i")]
    for name in names.split()
]


@pytest.mark.parametrize(("preset", "name", "shape", "axes"), PARAMETERS)
def test_preset_knows_the_fan_in(preset: str, name: str, shape: Any, axes: Any) -> None:
    grad = normal(1, *shape)
    (row,) = gcx.optax.plan({name: struct(*shape)}, preset)
    found = None if row.layout is None else row.layout.fan_in_axes(len(shape))
    assert (row.name, row.shape, found) == (name, shape, axes)
    assert row.reason.startswith("guess by name: ") == (axes is not None)
    updates, _ = gcx.optax.centralize(preset).update({name: grad}, optax.EmptyState())
    if axes is None:
        assert updates[name] is grad
    else:
        np.testing.assert_allclose(updates[name], centralized(grad, axes), atol=1e-14)


def test_plan_prints_what_happens_and_why() -> None:
    params = {
        "Conv_0": {"bias": struct(8), "kernel": struct(3, 3, 1, 8)},
        "Dense_0": {"kernel": struct(1, 5)},
        "attention": {"query": {"kernel": struct(6, 2, 3)}},
        "gate": None,
        "kernel": struct(5),
        "scales": struct(4, 2, dtype="float8_e8m0fnu"),
        "slope": struct(),
        "steps": struct(2, 3, dtype="int32"),
        "token": struct(1, 8),
    }
    expected = """\
parameter               shape    layout  reason
Conv_0/bias             8        -       bias
Conv_0/kernel           3x3x1x8  ...o    guess by name: kernel
Dense_0/kernel          1x5      -       fan-in 1: subtracting its mean would freeze it
attention/query/kernel  6x2x3    ioo     guess by name: attention projection
gate                    scalar   -       not an array
kernel                  5        -       a vector has no fan-in
scales                  4x2      -       not of floating dtype
slope                   scalar   -       a scalar has no fan-in
steps                   2x3      -       not of floating dtype
token                   1x8      -       unknown: no rule for this name
2 of 10 parameters centralized"""
    plan = gcx.optax.plan(params, "flax")
    assert str(plan) == expected
    assert gcx.optax.plan(params, plan) == plan


def test_plan_of_a_mapping() -> None:
    params = {name: struct(2, 4) for name in "abcde"} | {"table": struct(5, 3), "v": struct(3)}
    given = {
        "a": Layout("o(bi)", b=2),
        "[bt]*": LeaveAlone("a table"),
        "c": None,
        "d": "oi",
        "table": "io",  # too late: the first key that matches counts
        "v": "...o",
    }
    plan = gcx.optax.plan(params, given)
    assert {row.name: (row.layout, row.reason) for row in plan} == {
        "a": (given["a"], "as given"),
        "b": (None, "a table"),
        "c": (None, "as given"),
        "d": (Layout("oi"), "as given"),
        "e": (None, "unknown: no rule for this name"),
        "table": (None, "a table"),
        "v": (None, "a vector has no fan-in"),
    }
    assert gcx.optax.plan(params, plan) == plan


def test_function_gets_path_and_array_and_may_say_why() -> None:
    seen = []

    def rule(*args: Any) -> LeaveAlone:
        seen.append(args)
        return LeaveAlone("a token")

    plan = gcx.optax.plan({"a": [struct(2, 3)], "n": None}, rule)
    assert [row[2:] for row in plan] == [(None, "a token"), (None, "not an array")]
    assert seen == [("a/0", struct(2, 3))]


# --- errors come before training ------------------------------------------------------------------


class OfTorch:
    """Stands in for a model of torch, which is callable."""

    __module__ = "torch.nn.modules.linear"

    def __call__(self, name: str, array: Any) -> None:
        """Return None, as if it left every parameter alone."""


FOREIGN = r"is a torch\..*OfTorch; for torch use gcx\.torch$"
NO_LAYOUTS = (
    "layouts is an nnx or Equinox module or a dict or list of them, a mapping from path to "
    "layout or None, a function of path and array, a plan, or a preset "
    "('flax', 'haiku', 'equinox'), not "
)
PRESETS_ARE = "there are 'flax', 'haiku', 'equinox'"
NOT_LAYOUTS: list[tuple[Any, type[Exception], str]] = [
    *[
        (x, TypeError, re.escape(NO_LAYOUTS) + name)
        for x, name in ((3, "int"), (["...o"], "list"), (Layout("i"), "gcx"))
    ],
    *[
        (x, ValueError, re.escape(f"no preset '{x}'; {PRESETS_ARE}"))
        for x in ("torch", "Flax", "...o", "")
    ],
    (KERNELS, TypeError, "layouts: 'Dense_0' has a dict; a mapping is from .* give the model"),
    (OfTorch(), TypeError, f"^layouts {FOREIGN}"),
    (Boxed, TypeError, f"{re.escape(NO_LAYOUTS)}the class .*Boxed"),
]


@pytest.mark.parametrize(("layouts", "error", "message"), NOT_LAYOUTS)
def test_what_layouts_may_not_be(layouts: Any, error: type[Exception], message: str) -> None:
    for use in (gcx.optax.centralize, partial(gcx.optax.plan, {})):
        with pytest.raises(error, match=message):
            use(layouts)


def test_layouts_are_required() -> None:
    with pytest.raises(TypeError, match="'layouts'"):
        gcx.optax.centralize()
    with pytest.raises(TypeError, match=re.escape(f"{NO_LAYOUTS}NoneType")):
        gcx.optax.centralize(None)
    with pytest.raises(TypeError, match=r"^a tree of arrays has no layers: give layouts"):
        gcx.optax.plan(KERNELS)
    with pytest.raises(TypeError, match=f"^params {FOREIGN}"):
        gcx.optax.plan(OfTorch())
    of_what = "model is an nnx, linen or Equinox module, or the result of haiku.transform, not "
    for model, name in (("flax", "str"), ({}, "dict"), (None, "NoneType"), (jnp.ones, "function")):
        with pytest.raises(TypeError, match=f"^{of_what}{name}$"):
            gcx.optax.layouts(model)


class ForeignArray:
    """An array of a library with dtypes of its own, as torch has."""

    shape, dtype = (3, 2), object()


ONE = {"Dense_0": {"kernel": normal(1, 4, 3)}}
MISFIT = r"^Dense_0/kernel: layout 'ioo' .*rank 3, not 2$"
ABSENT = r"'Dense_7/\*' matches no parameter; there are: Dense_0/bias, Dense_0/kernel"
NOTHING = "(?s)there is nothing to centralize.*"
SHORT = gcx.optax.plan({"Dense_0": KERNELS["Dense_0"]}, "flax")
OTHER = Plan([PlanRow("Dense_0/kernel", (3, 4), Layout("io"), "Linear")])
OTHER_SHAPE = r"^Dense_0/kernel: the plan is for shape \(3, 4\), this array has shape \(4, 3\)"
REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "a key": ({"Dense_0/kernel": "...o", "Dense_7/*": "...o"}, KERNELS, ValueError, ABSENT),
    "a rank": ({"*/kernel": "ioo"}, ONE, ValueError, MISFIT),
    "a rank by a function": (lambda path, array: "ioo", ONE, ValueError, MISFIT),
    "a text": ({"*/kernel": "channels_last"}, ONE, ValueError, "layout 'channels_last' is not va"),
    "no text": (lambda path, array: (0,), ONE, TypeError, "^Dense_0/kernel: a layout is a string"),
    "another library's names": ("haiku", KERNELS, ValueError, f"{NOTHING}Dense_0/kernel .*unknown"),
    "flattened": ("flax", normal(1, 12), ValueError, rf"{NOTHING}optax\.flatten.* a vector has no"),
    "left alone": ({"*": None}, KERNELS, ValueError, f"{NOTHING}as given"),
    "a reason": ({"*": LeaveAlone("token")}, KERNELS, ValueError, f"{NOTHING}token"),
    "a plan that lacks a row": (SHORT, KERNELS, ValueError, "^layouts: .* no row 'Dense_1/bias'"),
    "a plan for another shape": (OTHER, ONE, ValueError, OTHER_SHAPE),
    "an array": (
        "flax",
        {"kernel": ForeignArray()},
        TypeError,
        "^kernel is a .*not an array of JAX",
    ),
}


@pytest.mark.parametrize(("layouts", "params", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_init_refuses_what_does_not_fit(
    layouts: Any, params: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        gcx.optax.centralize(layouts).init(params)


def test_hidden_leaves_may_match_the_key_and_no_row() -> None:
    grads = normal_like(30, KERNELS)
    kernel = grads["Dense_0"]["kernel"]
    mapping = {"Dense_1/kernel": "...o", "[EF]*": "...o", "Dense_0/kernel": None}
    for layouts, expected in ((mapping, kernel), (SHORT, centralized(kernel, (0,)))):
        masked = optax.masked(gcx.optax.centralize(layouts), FIRST_ONLY)
        updates, _ = masked.update(grads, masked.init(KERNELS))
        np.testing.assert_allclose(updates["Dense_0"]["kernel"], expected, atol=1e-15)


@pytest.mark.parametrize("mask", [FIRST_ONLY, {"Dense_0": True, "Dense_1": False}])
@pytest.mark.parametrize("key", ["Dense_0/kernal", "Dense_10/kernel"])
def test_errors_though_leaves_are_hidden(mask: Any, key: str) -> None:
    masked = optax.masked(gcx.optax.centralize({"Dense_0/kernel": "...o", key: "...o"}), mask)
    with pytest.raises(ValueError, match=f"'{key}' matches .*: Dense_0/bias, Dense_0/kernel$"):
        masked.init(KERNELS)
    masked = optax.masked(gcx.optax.centralize({"Dense_1/kernel": "...o"}), mask)
    with pytest.raises(ValueError, match=f"{NOTHING}Dense_0/kernel .*unknown.*'flax', 'haiku'"):
        masked.init(KERNELS)
