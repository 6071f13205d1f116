"""Layers of Keras: an output depends on the fan-in that gcx.keras declares, and on no more."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when Keras is imported, here or by gcx

import keras

import gcx.keras
import gcx.optax
from gcx.plan import LeaveAlone

from keras_support import derivative, to_numpy

pytestmark = pytest.mark.usefixtures("compiled_in_haste")  # on JAX

layers = keras.layers
RNG = np.random.default_rng(0)


# A layer and the shape of its input.
DIRECT: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Dense": (layers.Dense(4), (2, 5)),
    "Dense on a sequence": (layers.Dense(4), (2, 3, 5)),
    "Conv1D": (layers.Conv1D(4, 3), (2, 7, 5)),
    "Conv2D": (layers.Conv2D(4, 3, strides=2), (2, 7, 7, 5)),
    "Conv2D in groups": (layers.Conv2D(4, 3, groups=2), (2, 5, 5, 6)),
    "Conv3D": (layers.Conv3D(4, 2), (2, 5, 5, 5, 3)),
    "Conv1DTranspose": (layers.Conv1DTranspose(4, 3), (2, 7, 5)),
    "Conv2DTranspose": (layers.Conv2DTranspose(4, 3), (2, 7, 7, 5)),
    "Conv3DTranspose": (layers.Conv3DTranspose(4, 2), (2, 5, 5, 5, 3)),
    "DepthwiseConv1D": (layers.DepthwiseConv1D(3, depth_multiplier=2), (2, 7, 5)),
    "DepthwiseConv2D": (layers.DepthwiseConv2D(3, depth_multiplier=2), (2, 7, 7, 5)),
    "EinsumDense": (layers.EinsumDense("abc,cd->abd", (3, 4)), (2, 3, 5)),
    "EinsumDense, any batch": (layers.EinsumDense("...x,xy->...y", 4), (2, 3, 5)),
    "EinsumDense, batch last": (layers.EinsumDense("ab...,bc->ac...", 4), (2, 5, 3)),
    "EinsumDense into heads": (layers.EinsumDense("abc,cde->abde", (3, 2, 4)), (2, 3, 5)),
    "EinsumDense out of heads": (layers.EinsumDense("abde,dec->abc", (3, 4)), (2, 3, 2, 5)),
    "EinsumDense, output first": (layers.EinsumDense("ab,cb->ac", 4), (2, 5)),
    "EinsumDense, a kernel a place": (layers.EinsumDense("abc,bcd->abd", (3, 4)), (2, 3, 5)),
}
CONV_LSTM = layers.ConvLSTM2D(4, 3, recurrent_activation="sigmoid").cell
# And how many units of a weight one output depends on.
CELLS: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "SimpleRNNCell": (layers.SimpleRNNCell(4), (2, 5), 1),
    "GRUCell": (layers.GRUCell(4), (2, 5), 3),
    "LSTMCell": (layers.LSTMCell(4), (2, 5), 4),
    "ConvLSTMCell": (CONV_LSTM, (2, 7, 7, 5), 4),
}


def random(*shape: int) -> Any:
    return keras.ops.convert_to_tensor(RNG.uniform(0.5, 1.5, shape).astype("float32"))


def in_the_middle(output: Any) -> Any:
    """One output, away from the edges."""
    return output[tuple(n // 2 for n in output.shape)]


def assert_fan_in(layer: Any, output: Callable[[], Any], *, units: int) -> None:
    """An output depends on all of the fan-in of so many units of each weight, and on no others."""
    plan = gcx.keras.plan(layer)
    weights = [v for v in layer.trainable_variables if v.name.endswith("kernel")]
    assert weights
    for weight in weights:
        layout = plan[weight.path].layout
        assert layout is not None
        depends = derivative(lambda: in_the_middle(output()), weight) != 0
        axes = layout.fan_in_axes(depends.ndim)
        of_unit = depends.all(axes)
        np.testing.assert_array_equal(depends.any(axes), of_unit, err_msg=weight.path)
        assert of_unit.sum() == units < of_unit.size
        assert gcx.optax.plan({weight.path: to_numpy(weight)}, plan)[0].layout == layout


@pytest.mark.parametrize(("layer", "shape"), DIRECT.values(), ids=DIRECT)
def test_an_output_depends_on_its_fan_in(layer: Any, shape: tuple[int, ...]) -> None:
    x = random(*shape)
    layer(x)
    assert_fan_in(layer, lambda: layer(x), units=1)


@pytest.mark.parametrize(("cell", "shape", "units"), CELLS.values(), ids=CELLS)
def test_a_cell_depends_on_its_gates(cell: Any, shape: tuple[int, ...], units: int) -> None:
    x = random(*shape)
    cell.build(shape)
    inner = keras.ops.shape(x)[1:-1]
    state = random(shape[0], *(n - 2 for n in inner), 4)
    states = [state, state + 1] if units == 4 else [state]
    assert_fan_in(cell, lambda: cell(x, states)[0], units=units)


def decisions(model: Any) -> dict[str, str]:
    """Layout or reason of each variable, by its path below the model."""
    rows = gcx.keras.plan(model)
    return {r.name.partition("/")[2]: str(r.layout) if r.layout else r.reason for r in rows}


def built(layer: Any, *shapes: tuple[int, ...]) -> Any:
    layer(*[random(*shape) for shape in shapes])
    return layer


def test_layers_made_of_others() -> None:
    heads = {"query": "ioo", "key": "ioo", "value": "ioo", "attention_output": "iio"}
    for attention in (layers.MultiHeadAttention(2, 3), layers.GroupQueryAttention(4, 4, 2)):
        rows = gcx.keras.plan(built(attention, (2, 4, 6), (2, 4, 6)))
        assert {r.name.split("/")[-2]: str(r.layout) for r in rows if r.layout} == heads
        assert {r.reason for r in rows if not r.layout} == {"bias"}


EMBEDDING = "embedding: a row is an input, not an output unit"
NORM = {"gamma": "norm", "beta": "bias"}
CELL = {"kernel": "...o", "recurrent_kernel": "...o", "bias": "bias"}
# A layer, the shapes of its inputs, and its plan.
DECIDED: list[tuple[Any, Any, dict[str, str]]] = [
    (layers.Embedding(7, 3), (2,), {"embeddings": EMBEDDING}),
    (layers.BatchNormalization(), (2, 4), NORM),
    (layers.LayerNormalization(axis=(1, 2)), (2, 3, 4), NORM),
    (layers.GroupNormalization(2), (2, 4), NORM),
    (layers.RMSNormalization(), (2, 4), {"scale": "norm"}),
    (layers.PReLU(), (2, 3, 4), {"alpha": "slope of an activation"}),
    (layers.AdditiveAttention(), [(2, 3, 4)] * 2, {"scale": "scale of attention scores"}),
    (
        layers.EinsumDense("ab,b->ab", 5),
        (2, 5),
        {"kernel": "product element by element: there is no fan-in"},
    ),
    (
        layers.SeparableConv2D(4, 3),
        (2, 7, 7, 5),
        {"depthwise_kernel": "...oo", "pointwise_kernel": "...o", "bias": "bias"},
    ),
    (  # which holds the kernel too
        layers.SpectralNormalization(layers.Conv2D(4, 3, name="conv")),
        (2, 7, 7, 5),
        {"conv/kernel": "...o", "conv/bias": "bias"},
    ),
    (
        layers.Bidirectional(layers.GRU(4, name="gru")),
        (2, 3, 5),
        {f"{w}_gru/gru_cell/{n}": t for w in ("forward", "backward") for n, t in CELL.items()},
    ),
]


@pytest.mark.parametrize(("layer", "shape", "expected"), DECIDED)
def test_every_variable(layer: Any, shape: Any, expected: dict[str, str]) -> None:
    layer.build(shape)
    assert decisions(layer) == expected


def test_reversed_embedding_is_a_head() -> None:
    layer = layers.ReversibleEmbedding(7, 3, tie_weights=False)
    layer.build((2,))
    x = random(2, 3)
    (head,) = (v for v in layer.trainable_variables if v.name == "reverse_embeddings")
    depends = derivative(lambda: layer(x, reverse=True)[0, 4], head) != 0
    np.testing.assert_array_equal(depends, np.arange(7) == [[4]] * 3)
    assert decisions(layer) == {"embeddings": EMBEDDING, "reverse_embeddings": "io"}


@pytest.mark.parametrize(
    ("layer", "shape", "a", "b"),
    [
        (layers.Dense(4, use_bias=False), (2, 5), "...o", "io"),
        (layers.EinsumDense("abc,cde->abde", (3, 2, 4)), (2, 3, 5), "ioo", "io"),
        (layers.EinsumDense("ab,cb->ac", 4), (2, 5), "oi", "oi"),
    ],
)
def test_lora_factors_are_layers_of_their_own(layer: Any, shape: Any, a: str, b: str) -> None:
    built(layer, shape).enable_lora(2)
    assert decisions(layer) == {"lora_kernel_a": a, "lora_kernel_b": b}


def test_variables_that_are_listed() -> None:
    layer = built(layers.Dense(4), (2, 5))
    layer.quantize("int8")
    assert decisions(layer) == {"bias": "bias"}
    head = layers.Dense(3, name="head")
    model = keras.Sequential([keras.Input((5,)), layers.Dense(4, trainable=False), head])
    assert list(decisions(model)) == ["head/kernel", "head/bias"]
    x = keras.Input((4,))
    twice = layers.Dense(4, name="twice")
    assert list(decisions(keras.Model(x, twice(twice(x))))) == ["kernel", "bias"]


class Transposed(layers.Layer):
    """Uses the kernel of another layer the other way round."""

    def __init__(self, dense: Any) -> None:
        super().__init__(name="decoder")
        self.weight = dense.kernel

    def call(self, x: Any) -> Any:
        return keras.ops.matmul(x, keras.ops.transpose(self.weight))


class Declared(Transposed):
    """Has a rule, which agrees with that of the other layer."""


gcx.keras.register_layer(Declared)({"kernel": "...o"})


@pytest.mark.parametrize(
    ("other", "decision"),
    [
        (
            Transposed,
            "tied, and the rules differ: Dense; unknown: nobody declared Transposed.kernel",
        ),
        (Declared, "...o"),
    ],
)
def test_tied_weights_need_one_answer(other: Any, decision: str) -> None:
    dense = built(layers.Dense(3, use_bias=False), (2, 3))
    model = keras.Sequential([dense, other(dense)])
    model.build((None, 3))
    assert [str(row.layout or row.reason) for row in gcx.keras.plan(model)] == [decision]


class Bilinear(layers.Layer):
    def build(self, shape: Any) -> None:
        self.w = self.add_weight(shape=(3, shape[-1], shape[-1]), name="w")
        self.offset = self.add_weight(shape=(1, 3), name="offset")

    def call(self, x: Any) -> Any:
        return keras.ops.einsum("oij,bi,bj->bo", self.w, x, x) + self.offset


def test_who_answers_for_a_layer() -> None:
    class Registered(Bilinear):
        pass

    assert decisions(built(Bilinear(), (2, 4)))["w"] == "unknown: nobody declared Bilinear.w"
    gcx.keras.register_layer(Registered)(
        lambda layer: {"w": "oii", "offset": LeaveAlone("an offset")}
    )
    assert decisions(built(Registered(), (2, 4))) == {"w": "oii", "offset": "an offset"}
    layer = built(Bilinear(name="pair"), (2, 4))
    first, second = gcx.keras.plan(layer, overrides={"pair/w": "oii", "*": None})
    assert (str(first.layout), first.reason) == ("oii", "override")
    assert (second.layout, second.reason) == (None, "left alone by an override")


def test_a_model_without_variables_is_an_error() -> None:
    with pytest.raises(ValueError, match="net has no variables yet: build it first"):
        gcx.keras.plan(keras.Sequential([layers.Dense(3)], name="net"))
    with pytest.raises(TypeError, match=r"keras.Model or a keras.Layer, not list$"):
        gcx.keras.plan([])
