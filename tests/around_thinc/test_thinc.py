"""gcx.thinc in training by every optimizer of thinc, and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from thinc import api
from thinc.layers.resizable import resize_linear_weighted, resize_model

import gcx.thinc
from gcx import Layout
from gcx.testing import assert_centralized

import canonical_order
import reference
from copies import COPIES
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


class Counting(api.Optimizer):
    """An optimizer of the user, with an attribute of its own."""

    steps = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.steps += 1
        return super().__call__(*args, **options)


COUPLED: dict[str, Any] = {"L2_is_weight_decay": False}
# Optimizer, rate, options, and where; of where="update" each of them.
TRAININGS: list[tuple[Any, Any, dict[str, Any], Any]] = [
    (api.SGD, 0.1, {"grad_clip": 1e-3}, "gradient"),
    (api.SGD, 0.1, {"L2": 0.1, **COUPLED}, "gradient"),
    (api.SGD, [0.1, 0.05, 0.02], {"L2": [0.1, 0.2, 0.3], **COUPLED}, "gradient"),
    *[(api.SGD, 0.1, {"L2": decay}, "update") for decay in (0.0, 0.1)],
    *[(api.Adam, 0.01, {"L2": decay}, "update") for decay in (0.0, 0.1)],
    *[(api.RAdam, 0.01, {"L2": decay}, "update") for decay in (0.0, 0.1)],
    (api.Adam, 0.01, {"use_averages": False}, "update"),
]


@pytest.mark.parametrize(("kind", "rate", "options", "where"), TRAININGS)
def test_training_keeps_the_means(kind: Any, rate: Any, options: Any, where: Any) -> None:
    model, optimizer = network(), kind(rate, **options)
    start = weights(model)
    gcx.thinc.centralize(optimizer, model, where=where)
    train(model, optimizer)
    assert_means_kept(model, start)
    assert (optimizer.averages is None) == (options.get("use_averages") is False)


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


@pytest.mark.parametrize("copied_by", [copy.copy, copy.deepcopy, COPIES["pickle"]])
def test_subclasses_of_the_optimizer(copied_by: Callable[[Any], Any]) -> None:
    model = network()
    start = weights(model)
    optimizer = Counting(0.1)
    optimizer.b1 = optimizer.b2 = api.SGD(0.1).b1  # none
    handle = gcx.thinc.centralize(optimizer, model)
    train(model, optimizer, steps=2)
    assert optimizer.steps == 2 * 6
    assert_means_kept(model, start)
    with pytest.warns(UserWarning, match="copy of this Counting does not centralize: call"):
        copied = copied_by(optimizer)
    assert type(copied) is Counting
    assert copied.nr_update == optimizer.nr_update
    assert copied.steps == optimizer.steps
    assert optimizer.gradient_centralization is handle


def test_several_models_share_an_optimizer() -> None:
    layer = api.Linear(nO=3, nI=3)  # which is used twice, and listed once
    plan = gcx.thinc.plan(api.chain(layer, layer).initialize())
    assert [row.name for row in plan] == ["0.linear.W", "0.linear.b"]
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
    layer = api.Linear(nO=2, nI=3).initialize()
    layer.set_param("W", layer.get_param("W").astype("complex64"))
    with pytest.raises(TypeError, match=r"linear\.W: reproducible=True is for .*complex64"):
        centralize(optimizer, layer, reproducible=True)
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
