"""gcx.thinc: layouts by layer, training by every optimizer of thinc, and errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from thinc import api
from thinc.layers.resizable import resize_linear_weighted, resize_model

import gcx.thinc
from gcx import Layout
from gcx.plan import LeaveAlone
from gcx.testing import assert_centralized

import canonical_order
import reference
from same_bits import assert_same_bits

PIXELS, DIGITS = load_digits(return_X_y=True)
X, Y = (PIXELS / 16).astype("float32"), np.eye(10, dtype="float32")[DIGITS]
RNG = np.random.default_rng(0)


def network() -> Any:
    """A maxout and a softmax layer, always with the same weights."""
    api.fix_random_seed(0)
    model = api.chain(api.Maxout(nO=16, nI=64, nP=2), api.LayerNorm(nI=16), api.Softmax(nO=10))
    return model.initialize(X=X[:2], Y=Y[:2])


def train(model: Any, optimizer: Any, *, steps: int = 8, examples: int = 64) -> None:
    for _ in range(steps):
        prediction, backprop = model.begin_update(X[:examples])
        backprop((prediction - Y[:examples]) / examples)
        model.finish_update(optimizer)
        optimizer.step_schedules()


def weights(model: Any) -> dict[str, Any]:
    return {
        layer.name: layer.get_param("W").copy() for layer in model.walk() if layer.has_param("W")
    }


def assert_means_kept(model: Any, start: dict[str, Any]) -> None:
    """Corollary 4.1, which also fails if nothing was trained."""
    for name, weight in weights(model).items():
        assert_centralized(weight, start=start[name], axis=-1)


def forward(model: Any, x: Any, is_train: bool) -> Any:
    """The layer of a test that does not call it."""
    raise AssertionError


def registered(rule: Any) -> Any:
    """A layer of one's own, of the weights W and V, with a rule."""

    def forward(model: Any, x: Any, is_train: bool) -> Any:
        raise AssertionError

    gcx.thinc.register_layer(forward)(rule)
    weight = np.ones((3, 4), "float32")
    return api.Model("mine", forward, params={"W": weight, "V": weight})


class Counting(api.Optimizer):
    """An optimizer of the user, with an attribute of its own."""

    steps = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.steps += 1
        return super().__call__(*args, **options)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": lambda **options: api.SGD(0.1, **options),
    "Adam": lambda **options: api.Adam(0.01, **options),
    "RAdam": lambda **options: api.RAdam(0.01, **options),
}


def assert_training_keeps_the_means(optimizer: Any, where: Any = "gradient") -> None:
    model = network()
    start = weights(model)
    gcx.thinc.centralize(optimizer, model, where=where)
    train(model, optimizer)
    assert_means_kept(model, start)


COUPLED: dict[str, Any] = {"L2_is_weight_decay": False}
SGDS: dict[str, Callable[[], Any]] = {
    "clipped": lambda: api.SGD(0.1, grad_clip=1e-3),
    "L2": lambda: api.SGD(0.1, L2=0.1, **COUPLED),
    "schedules": lambda: api.SGD([0.1, 0.05, 0.02], L2=[0.1, 0.2, 0.3], **COUPLED),
}


@pytest.mark.parametrize("make", SGDS.values(), ids=SGDS)
def test_sgd_keeps_the_means(make: Callable[[], Any]) -> None:
    assert_training_keeps_the_means(make())


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_all_keep_the_means_in_the_update(make: Callable[..., Any], decay: float) -> None:
    assert_training_keeps_the_means(make(L2=decay), "update")


def by_half(x: Any) -> Any:
    return reference.centralized(x.reshape(3, 2, 3), (2,)).reshape(3, 6)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("reproducible", [False, True])
def test_weight_decay_outside_and_inside_the_gradient(reproducible: bool, coupled: bool) -> None:
    model = api.Linear(nO=3, nI=6).initialize()
    start = model.get_param("W").astype("float64")
    grad = RNG.standard_normal((3, 6)).astype("float32")
    optimizer = api.SGD(0.5, L2=0.1, L2_is_weight_decay=not coupled, grad_clip=0.0)
    halves = {"*W": Layout("o(bi)", b=2)}
    gcx.thinc.centralize(optimizer, model, overrides=halves, reproducible=reproducible)
    model.set_grad("W", grad.copy())
    model.finish_update(optimizer)
    if coupled:
        expected = start - 0.5 * by_half(grad + 0.1 * start)
    else:
        expected = (start - 0.5 * by_half(grad)) * 0.95
    np.testing.assert_allclose(model.get_param("W"), expected, rtol=0, atol=1e-6)


def test_averages_are_those_of_the_weights() -> None:
    model = api.Linear(nO=3, nI=5).initialize()
    optimizer = api.Adam(0.01)
    gcx.thinc.centralize(optimizer, model, where="update")
    expected = np.zeros((3, 5))
    for step in range(1, 6):
        model.set_grad("W", RNG.standard_normal((3, 5)).astype("float32"))
        model.finish_update(optimizer)
        decay = (1 + step) / (10 + step)
        expected -= (1 - decay) * (expected - model.get_param("W"))
    average = optimizer.averages[model.id, "W"]
    np.testing.assert_allclose(average, expected, rtol=0, atol=1e-6)


def test_averages_may_be_switched_off() -> None:
    model = network()
    optimizer = api.Adam(0.01, use_averages=False)
    gcx.thinc.centralize(optimizer, model, where="update")
    train(model, optimizer)
    assert optimizer.averages is None


def test_reproducible_gradients_have_those_of_the_decay_too() -> None:
    layer = api.Linear(nO=5, nI=1000).initialize()
    optimizer = api.SGD(2**-4, grad_clip=0.0, L2=0.5, L2_is_weight_decay=False)
    gcx.thinc.centralize(optimizer, layer, reproducible=True)
    rng, half = np.random.default_rng(0), np.float32(0.5)
    start, grad = (rng.normal(m, 1, (5, 1000)).astype("float32") for m in (0.1, 0.3))
    layer.set_param("W", start.copy())
    layer.set_grad("W", grad.copy())
    layer.finish_update(optimizer)
    means = np.array([[canonical_order.scaled_mean(row, 1.0)] for row in start])
    centralized = canonical_order.centralized(grad, (1,), "float32")
    expected = centralized - half * means + half * start  # which the optimizer adds
    assert_same_bits(layer.get_param("W"), start - np.float32(2**-4) * expected)


def test_bits_that_cannot_be_promised_are_an_error() -> None:
    layer = api.Linear(nO=2, nI=3).initialize()
    layer.set_param("W", layer.get_param("W").astype("complex64"))
    optimizer = api.SGD(0.1)
    with pytest.raises(TypeError, match=r"linear\.W: reproducible=True is for .*complex64"):
        gcx.thinc.centralize(optimizer, layer, reproducible=True)
    assert type(optimizer) is api.Optimizer


def pickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("copied_by", [copy.copy, copy.deepcopy, pickled])
def test_copies_of_a_subclass(copied_by: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = Counting(0.1)
    handle = gcx.thinc.centralize(optimizer, model)
    train(model, optimizer, steps=2)
    with pytest.warns(UserWarning, match="copy of this Counting does not centralize: call"):
        copied = copied_by(optimizer)
    assert type(copied) is Counting
    assert copied.nr_update == optimizer.nr_update
    assert copied.steps == optimizer.steps
    assert optimizer.gradient_centralization is handle
    second = gcx.thinc.centralize(copied, model)
    second.remove()
    assert optimizer.gradient_centralization is handle, "of the original, not of the copy"


def test_subclasses_of_the_optimizer() -> None:
    model = network()
    start = weights(model)
    optimizer = Counting(0.1)
    optimizer.b1 = optimizer.b2 = api.SGD(0.1).b1  # none
    gcx.thinc.centralize(optimizer, model)
    train(model, optimizer, steps=2)
    assert optimizer.steps == 2 * 6
    assert_means_kept(model, start)


DENSE = [
    *("ClippedLinear", "Dish", "Gelu", "HardSwish", "HardSwishMobilenet", "Linear", "Mish"),
    *("MultiSoftmax", "Relu", "Sigmoid", "Softmax", "Swish"),
]
FLAT = "flat: one vector holds all weights, so the fan-in is not visible"


def decisions(model: Any) -> dict[str, str]:
    return {r.name: str(r.layout) if r.layout else r.reason for r in gcx.thinc.plan(model)}


def support(layer: Any, output: Callable[[], Any]) -> Any:
    """Which weights change an output, by differences."""
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


def test_windows_of_a_convolution_are_dense() -> None:
    model = api.with_array(api.chain(api.expand_window(1), api.Mish(nO=4, nI=9)))
    sentences = [np.ones((5, 3), "float32")]
    model.initialize(X=sentences)
    assert list(decisions(model).values()) == ["oi", "bias"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: api.Embed(nO=3, nV=5), {"embed.E": "embedding"}),
        (lambda: api.HashEmbed(nO=3, nV=5), {"hashembed.E": "embedding"}),
        (lambda: api.LayerNorm(nI=3), {"layernorm.G": "norm", "layernorm.b": "bias"}),
        (lambda: api.CauchySimilarity(nI=3), {"cauchy_similarity.W": "scale of each dimension"}),
        (
            lambda: api.SparseLinear(nO=3, length=8),
            {"sparse_linear.W": FLAT, "sparse_linear.b": "bias"},
        ),
    ],
    ids=["Embed", "HashEmbed", "LayerNorm", "CauchySimilarity", "SparseLinear"],
)
def test_what_has_no_fan_in_is_left_alone(make: Any, expected: dict[str, str]) -> None:
    found = decisions(make().initialize())
    assert found.keys() == expected.keys()
    assert all(found[name].startswith(reason) for name, reason in expected.items())


def test_the_weights_of_an_lstm_are_one_vector() -> None:
    layer = api.LSTM(nO=4, nI=3).initialize()
    found = {name.rpartition(".")[2]: reason for name, reason in decisions(layer).items()}
    assert found == {"LSTM": FLAT, "HC0": "initial state"}


def test_the_query_of_attention_is_one_unit() -> None:
    layer = api.ParametricAttention(nO=4).initialize()
    assert decisions(layer) == {"para-attn.Q": "i"}
    query = layer.get_param("Q").copy()
    optimizer = api.SGD(0.1)
    gcx.thinc.centralize(optimizer, layer)
    layer.set_grad("Q", RNG.standard_normal(4).astype("float32"))
    layer.finish_update(optimizer)
    assert_centralized(layer.get_param("Q"), start=query, layout="i")


def test_fan_in_of_one_is_not_frozen() -> None:
    layer = api.Linear(nO=3, nI=1).initialize()
    assert decisions(layer)["linear.W"].startswith("fan-in 1")


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


def test_rules_may_have_globs_and_be_mappings() -> None:
    for rule in ({"V": None, "?": "oi"}, lambda layer: {"V": None, "?": "oi"}):
        found = {"mine.W": "oi", "mine.V": "left alone by the rule of mine"}
        assert decisions(registered(rule)) == found


def test_overrides_take_precedence() -> None:
    model, optimizer = network(), api.SGD(0.1)
    overrides = {"0.maxout.W": None, "*.softmax.W": "oi", "*.G": LeaveAlone("mine")}
    handle = gcx.thinc.centralize(optimizer, model, overrides=overrides)
    assert handle.plan == gcx.thinc.plan(model, overrides=overrides)
    assert handle.plan["0.maxout.W"].reason == "left alone by an override"
    assert handle.plan["2.softmax.W"].reason == "override"
    assert handle.plan["1.layernorm.G"].reason == "mine"


def test_rules_that_are_none_are_an_error() -> None:
    with pytest.raises(
        TypeError, match=r"^the rule of .*forward is a mapping or a function, not 'oi'"
    ):
        registered("oi")
    with pytest.raises(TypeError, match=r"^the rule of .*forward returned None; a rule returns"):
        gcx.thinc.plan(registered(lambda layer: None))


def test_layers_used_twice_are_listed_once() -> None:
    layer = api.Linear(nO=3, nI=3)
    model = api.chain(layer, layer).initialize()
    assert list(decisions(model)) == ["0.linear.W", "0.linear.b"]


def test_several_models_share_an_optimizer() -> None:
    first, second = network(), network()
    optimizer = api.SGD(0.1)
    handle = gcx.thinc.centralize(optimizer, first, second)
    assert handle.plan[0].name == "0.0.maxout.W"
    assert len(handle.plan) == len({row.name for row in handle.plan})
    starts = weights(first), weights(second)
    for model, start in zip((first, second), starts, strict=True):
        train(model, optimizer)
        assert_means_kept(model, start)


def test_layers_that_are_replaced_are_covered() -> None:
    head = api.Linear(nO=2, nI=4)
    model = api.resizable(head, resize_layer=resize_linear_weighted).initialize()
    optimizer = api.SGD(0.1)
    gcx.thinc.centralize(optimizer, model)
    resize_model(model, 3)
    (new,) = model.layers
    start = new.get_param("W").copy()
    new.set_grad("W", RNG.standard_normal((3, 4)).astype("float32"))
    model.finish_update(optimizer)
    assert_centralized(new.get_param("W"), start=start)


class Foreign(api.Shim):
    """A model of another framework, with one parameter."""

    weight = np.ones((2, 3), "float32")

    def finish_update(self, optimizer: Any) -> None:
        grad = np.ones((2, 3), "float32")
        self.weight, _ = optimizer((self.id, "weight"), self.weight.copy(), grad)


def test_models_of_other_frameworks_are_left_alone() -> None:
    shim = Foreign(None)
    model = api.chain(api.Linear(nO=3, nI=4), api.Model("wrapped", forward, shims=[shim]))
    model.initialize()
    optimizer = api.SGD(0.5, grad_clip=0.0)
    gcx.thinc.centralize(optimizer, model)
    assert decisions(model)["1.wrapped.Foreign"].startswith("a model of another")
    model.finish_update(optimizer)
    np.testing.assert_array_equal(shim.weight, np.full((2, 3), 0.5))


def test_models_of_other_frameworks_are_looked_for_once() -> None:
    asked: list[str] = []

    def rule(layer: Any) -> Any:
        asked.append(layer.name)
        return {"*": None}

    layer = registered(rule)
    layer.shims.append(Foreign(None))
    model = api.chain(api.Linear(nO=3, nI=4), layer).initialize()
    optimizer = api.SGD(0.5)
    gcx.thinc.centralize(optimizer, model)
    model.finish_update(optimizer)
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


def test_what_cannot_be_centralized_is_an_error() -> None:
    model, optimizer = network(), api.SGD(0.1)
    centralize = gcx.thinc.centralize
    with pytest.raises(TypeError, match=r"is a thinc.api.Optimizer, not str$"):
        centralize("SGD.v1", model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="one or more thinc models; given: none"):
        centralize(optimizer)
    with pytest.raises(TypeError, match="given: list"):
        centralize(optimizer, [model])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"linear.W has no value yet: call model.initialize"):
        centralize(optimizer, api.Linear(nO=2, nI=3))
    with pytest.raises(ValueError, match="nothing to centralize in these models:\nparameter"):
        centralize(optimizer, api.Embed(nO=3, nV=5).initialize())
    assert type(optimizer) is api.Optimizer


def test_parameters_of_other_models_are_an_error() -> None:
    optimizer = api.SGD(0.1)
    handle = gcx.thinc.centralize(optimizer, network())
    assert repr(handle) == (
        "<GradientCentralization of Optimizer, where='gradient', "
        "<gcx plan: 2 of 6 parameters centralized>>"
    )
    with pytest.raises(RuntimeError, match="of a layer that is not in the models given"):
        train(network(), optimizer)
