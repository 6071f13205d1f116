"""gcx.thinc on layers: a layout says which weights an output depends on."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from thinc import api

import gcx.thinc
from gcx.plan import LeaveAlone
from gcx.testing import assert_centralized

RNG = np.random.default_rng(0)


def forward(model: Any, x: Any, is_train: bool) -> Any:
    """Stand for a layer that is not called."""
    raise AssertionError


def registered(rule: Any) -> Any:
    """A layer of one's own, of the weight W, with a rule."""

    def forward(model: Any, x: Any, is_train: bool) -> Any:
        raise AssertionError

    gcx.thinc.register_layer(forward)(rule)
    return api.Model("mine", forward, params={"W": np.ones((3, 4), "float32")})


DENSE = [
    *("ClippedLinear", "Dish", "Gelu", "HardSwish", "HardSwishMobilenet", "Linear", "Mish"),
    *("MultiSoftmax", "Relu", "Sigmoid", "Softmax", "Swish"),
]
FLAT = "flat: one vector holds all weights, so the fan-in is not visible"


def decisions(model: Any) -> dict[str, str]:
    return {r.name: str(r.layout) if r.layout else r.reason for r in gcx.thinc.plan(model)}


def support(layer: Any, output: Callable[[], Any]) -> Any:
    """Find the weights that change an output, by differences."""
    weight = layer.get_param("W")
    before = output()
    found = np.zeros(weight.shape, bool)
    for index in np.ndindex(*weight.shape):
        changed = weight.copy()
        changed[index] += 0.25
        layer.set_param("W", changed)
        found[index] = output() != before
    layer.set_param("W", weight)
    return found


@pytest.mark.parametrize("name", DENSE)
def test_dense_layers(name: str) -> None:
    kind = getattr(api, name)
    layer = (kind((2, 1), nI=4) if name == "MultiSoftmax" else kind(nO=3, nI=4)).initialize()
    (weight, bias) = gcx.thinc.plan(layer)
    assert (str(weight.layout), bias.reason) == ("oi", "bias")
    if "Softmax" in name:
        return  # its outputs are normalized together
    layer.set_param("W", RNG.uniform(0.1, 0.2, (3, 4)).astype("float32"))
    expected = np.zeros((3, 4), bool)
    expected[1] = True
    x = np.full((1, 4), 0.5, "float32")
    np.testing.assert_array_equal(support(layer, lambda: layer.predict(x)[0, 1]), expected)


def test_each_piece_of_maxout_is_a_unit() -> None:
    layer = api.Maxout(nO=3, nI=4, nP=2).initialize()
    assert decisions(layer) == {"maxout.W": "ooi", "maxout.b": "bias"}
    layer.set_param("b", np.array([[0, 9], [0, 9], [9, 0]], "float32"))  # the largest are these
    expected = np.zeros((3, 2, 4), bool)
    expected[1, 1] = True
    x = np.ones((1, 4), "float32")
    np.testing.assert_array_equal(support(layer, lambda: layer.predict(x)[0, 1]), expected)


def test_layers_inside_wrappers_are_found() -> None:
    model = api.with_array(api.chain(api.expand_window(1), api.Mish(nO=4, nI=9))).initialize()
    assert decisions(model) == {"0.1.mish.W": "oi", "0.1.mish.b": "bias"}


WITHOUT_FAN_IN: list[tuple[Any, dict[str, str]]] = [
    (api.Embed(nO=3, nV=5), {"embed.E": "embedding"}),
    (api.HashEmbed(nO=3, nV=5), {"hashembed.E": "embedding"}),
    (api.LayerNorm(nI=3), {"layernorm.G": "norm", "layernorm.b": "bias"}),
    (api.CauchySimilarity(nI=3), {"cauchy_similarity.W": "scale of each dimension"}),
    (api.SparseLinear(nO=3, length=8), {"sparse_linear.W": FLAT, "sparse_linear.b": "bias"}),
    (api.LSTM(nO=4, nI=3), {"LSTM": FLAT, "HC0": "initial state"}),
    (api.Linear(nO=3, nI=1), {"linear.W": "fan-in 1", "linear.b": "bias"}),
]


@pytest.mark.parametrize(("layer", "expected"), WITHOUT_FAN_IN)
def test_what_has_no_fan_in_is_left_alone(layer: Any, expected: dict[str, str]) -> None:
    found = decisions(layer.initialize())
    if "LSTM" in expected:
        found = {name.rpartition(".")[2]: reason for name, reason in found.items()}
    assert found.keys() == expected.keys()
    assert all(found[name].startswith(reason) for name, reason in expected.items())


def test_the_query_of_attention_is_one_unit() -> None:
    layer = api.ParametricAttention(nO=4).initialize()
    assert decisions(layer) == {"para-attn.Q": "i"}
    query = layer.get_param("Q").copy()
    optimizer = api.SGD(0.1)
    gcx.thinc.centralize(optimizer, layer)
    layer.set_grad("Q", RNG.standard_normal(4).astype("float32"))
    layer.finish_update(optimizer)
    assert_centralized(layer.get_param("Q"), start=query, layout="i")


def test_unknown_layers_are_listed_until_they_are_registered() -> None:
    layer = api.Model("mine", forward, params={"W": np.ones((3, 4), "float32"), "offset": None})
    layer.set_param("offset", np.ones((1, 3), "float32"))
    assert decisions(layer)["mine.W"] == "unknown: nobody declared mine.W"
    gcx.thinc.register_layer(forward)(lambda _: {"W": "oi", "offset": LeaveAlone("an offset")})
    assert decisions(layer) == {"mine.W": "oi", "mine.offset": "an offset"}
    with pytest.raises(TypeError, match="takes the forward function of a layer, not 'linear'"):
        gcx.thinc.register_layer("linear")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the forward function of a layer, not <thinc"):
        gcx.thinc.register_layer(layer)


class Foreign(api.Shim):
    """A model of another framework, with one parameter."""

    weight = np.ones((2, 3), "float32")

    def finish_update(self, optimizer: Any) -> None:
        grad = np.ones((2, 3), "float32")
        self.weight, _ = optimizer((self.id, "weight"), self.weight.copy(), grad)


def test_models_of_other_frameworks_are_left_alone_and_looked_for_once() -> None:
    asked: list[str] = []

    def rule(layer: Any) -> Any:
        asked.append(layer.name)
        return {"*": None}

    shim, layer = Foreign(None), registered(rule)
    layer.shims.append(shim)
    model = api.chain(api.Linear(nO=3, nI=4), layer).initialize()
    optimizer = api.SGD(0.5, grad_clip=0.0)
    gcx.thinc.centralize(optimizer, model)
    assert decisions(model)["1.mine.Foreign"].startswith("a model of another")
    model.finish_update(optimizer)
    np.testing.assert_array_equal(shim.weight, np.full((2, 3), 0.5))
    assert asked
    asked.clear()
    model.finish_update(optimizer)
    assert not asked


@pytest.mark.skipif(find_spec("spacy") is None, reason="needs spacy")
def test_a_unit_of_the_parser_of_spacy_adds_up_its_features() -> None:
    from spacy.ml._precomputable_affine import PrecomputableAffine

    layer = PrecomputableAffine(nO=3, nI=4, nF=2, nP=2).initialize()
    x, features = np.ones((5, 4), "float32"), np.array([1, 3])
    assert [str(row.layout) for row in gcx.thinc.plan(layer)] == ["iooi", "None", "None"]

    def unit() -> Any:  # as the parser does it: one row for each feature of a state
        rows = layer.predict(x)[1:]
        return sum(rows[row, feature, 1, 0] for feature, row in enumerate(features))

    expected = np.zeros((2, 3, 2, 4), bool)
    expected[:, 1, 0, :] = True
    np.testing.assert_array_equal(support(layer, unit), expected)
