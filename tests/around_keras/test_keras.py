"""gcx.keras in training: fit and loops of one's own, every option of an optimizer, errors."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when Keras is imported, here or by gcx

import keras

import gcx.keras

import reference
from keras_support import (
    ASKED_BACKEND,
    GRAD,
    LOSS,
    PIXELS,
    SGD,
    LossScale,
    assert_fit_keeps_the_means,
    assert_means_kept,
    centralized_model,
    fit,
    kernel_model,
    kernels,
    small_model,
    step,
    to_numpy,
)

pytestmark = pytest.mark.usefixtures("compiled_in_haste")  # on JAX


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 3},
    "eager": {"gradient_accumulation_steps": 2},
    "clipnorm": {"clipnorm": 1e-2},
    "global_clipnorm": {"global_clipnorm": 1e-2},
    "clipvalue": {"clipvalue": 1e-3},
    "ema": {"use_ema": True, "ema_momentum": 0.5},
    "ema overwriting": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
    "ema of accumulated": {"use_ema": True, "gradient_accumulation_steps": 2},
    "loss_scale_factor": {"loss_scale_factor": 1024.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_an_optimizer(where: Any, name: str) -> None:
    optimizer = SGD(0.01, momentum=0.9, **OPTIONS[name])
    if where == "update":
        optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1, **OPTIONS[name])
    model = centralized_model(optimizer, run_eagerly=name == "eager", where=where)
    assert_fit_keeps_the_means(model)


@pytest.mark.parametrize(
    "name", ["Adadelta", "Adafactor", "Adagrad", "Adamax", "Ftrl", "Lion", "Muon", "Nadam"]
)
def test_the_other_optimizers_too(name: str) -> None:
    model = kernel_model()
    start = kernels(model)
    optimizer = getattr(keras.optimizers, name)(0.01)
    gcx.keras.centralize(optimizer, model, where="update")
    for _ in range(3):
        step(optimizer, model)
    assert_means_kept(model, start)


@pytest.mark.parametrize("wraps", [lambda o: o, LossScale], ids=["alone", "loss scale"])
def test_schedules_and_loss_scales(where: Any, wraps: Callable[[Any], Any]) -> None:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.9)
    model = centralized_model(optimizer := wraps(SGD(schedule, momentum=0.9)), where=where)
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    assert "of SGD" in repr(inner.gradient_centralization)
    assert_fit_keeps_the_means(model)


def test_mixed_precision_wraps_the_optimizer_itself() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = small_model()
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = SGD(0.01)
    gcx.keras.centralize(optimizer, model)
    model.compile(optimizer, loss=LOSS)
    assert isinstance(model.optimizer, LossScale)
    assert_fit_keeps_the_means(model, epochs=4)


CENTRALIZED = 0.5 * reference.centralized(GRAD, (0,))
CLIPPED = 0.5 * reference.centralized(np.clip(GRAD, -0.5, 0.5), (0,))
DECAY, UPDATE = {"weight_decay": 0.1}, {"where": "update"}


def with_means_kept(w: Any) -> Any:
    return reference.centralized(0.95 * w - 0.5 * GRAD, (0,)) + reference.fan_in_means(w, (0,))


# Options of the layer, of SGD and of gcx, and the kernel after a step.
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], Callable[[Any], Any]]] = {
    "after clipping": ({}, {"clipvalue": 0.5}, {}, lambda w: w - CLIPPED),
    "beside decay": ({}, DECAY, {}, lambda w: w * 0.95 - CENTRALIZED),
    "before a constraint": (
        {"kernel_constraint": "non_neg", "kernel_initializer": "zeros"},
        {},
        UPDATE,
        lambda w: np.maximum(w - CENTRALIZED, 0),
    ),
    "around decay": ({}, DECAY, UPDATE, with_means_kept),
    "decay inside": ({}, DECAY, {**UPDATE, "decay": "inside"}, with_means_kept),
    "decay outside": (
        {},
        DECAY,
        {**UPDATE, "decay": "outside"},
        lambda w: with_means_kept(w) - 0.05 * reference.fan_in_means(w, (0,)),
    ),
}


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("accumulate", [None, 2])
@pytest.mark.parametrize("case", STEPS)
def test_a_step_is_centralized(case: str, accumulate: Any, reproducible: bool) -> None:
    of_layer, of_sgd, options, expected = STEPS[case]
    model = kernel_model(**of_layer)
    (start,) = kernels(model).values()
    optimizer = SGD(0.5, gradient_accumulation_steps=accumulate, **of_sgd)
    gcx.keras.centralize(optimizer, model, reproducible=reproducible, **options)
    for _ in range(accumulate or 1):
        step(optimizer, model)
    np.testing.assert_allclose(*kernels(model).values(), expected(start), rtol=0, atol=1e-6)


def test_a_regularizer_is_inside_the_gradient() -> None:
    model = kernel_model(kernel_regularizer=keras.regularizers.L2(0.1))
    start = kernels(model)
    optimizer = SGD(0.5)
    gcx.keras.centralize(optimizer, model)
    model.compile(optimizer, loss="mse")
    model.fit(PIXELS[:8, :5], PIXELS[:8, :3] / 99, epochs=5, verbose=0)
    assert_means_kept(model, start)


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
def test_a_missing_gradient_is_none_of_our_business() -> None:
    model = small_model()
    optimizer = SGD(0.5)
    gcx.keras.centralize(optimizer, model)
    start = kernels(model)
    grads = [
        None if v.name == "bias" else keras.ops.ones(v.shape) for v in model.trainable_variables
    ]
    optimizer.apply(grads, model.trainable_variables)
    for path, kernel in kernels(model).items():  # the gradients are their own means
        np.testing.assert_allclose(kernel, start[path], rtol=0, atol=1e-6)


def test_stateless_steps() -> None:
    model = kernel_model()
    optimizer = SGD(0.5, momentum=0.9)
    gcx.keras.centralize(optimizer, model)
    optimizer.build(model.trainable_variables)
    weights, _ = optimizer.stateless_apply(
        [v.value for v in optimizer.variables],
        [keras.ops.convert_to_tensor(GRAD)],
        [v.value for v in model.trainable_variables],
    )
    if ASKED_BACKEND == "jax":  # torch writes in place, where Keras has its fast steps
        (start,) = kernels(model).values()
        expected = start - 0.5 * reference.centralized(GRAD, (0,))
        np.testing.assert_allclose(to_numpy(weights[0]), expected, rtol=0, atol=1e-6)


def test_a_compiled_step_out_of_reach_is_told() -> None:
    model = small_model(optimizer=SGD(0.01))
    fit(model)
    inner = keras.Sequential([keras.Input((8, 8, 1)), *model.layers])
    if ASKED_BACKEND == "jax":
        with pytest.warns(UserWarning, match="has taken steps already"):
            gcx.keras.centralize(model.optimizer, inner)
    else:  # torch compiles nothing
        gcx.keras.centralize(model.optimizer, inner)


def test_the_optimizer_keeps_its_class() -> None:
    model = kernel_model()
    optimizer = SGD(0.1)
    kind = type(optimizer)  # on torch, not keras.optimizers.SGD but its fast subclass
    assert (kind is SGD) == (ASKED_BACKEND == "jax")
    gcx.keras.centralize(optimizer, model)
    assert isinstance(optimizer, kind)
    assert isinstance(optimizer, gcx.keras.Centralized)


def test_the_plan_is_that_of_the_variables_trained() -> None:
    model = small_model(optimizer=SGD(0.01))
    handle = gcx.keras.centralize(model.optimizer, model)
    assert handle.plan == gcx.keras.plan(model)
    model.get_layer("conv").trainable = False
    fit(model)
    assert [row.name for row in handle.plan if row.layout] == ["net/head/kernel"]
    # A layer that is unfrozen before training is covered.
    optimizer = SGD(0.01)
    gcx.keras.centralize(optimizer, model)
    model.get_layer("conv").trainable = True
    model.compile(optimizer, loss=LOSS)
    assert_fit_keeps_the_means(model)


def test_convolutions_alone() -> None:
    model, optimizer = small_model(), SGD(0.01)
    handle = gcx.keras.centralize(optimizer, model, layers="conv")
    assert handle.plan == gcx.keras.plan(model, layers="conv")
    assert handle.plan["net/conv/kernel"].layout is not None
    assert handle.plan["net/head/kernel"].reason == "not a convolution, and layers='conv'"
    assert handle.plan["net/head/bias"].reason == "bias"
    overridden = gcx.keras.plan(model, layers="conv", overrides={"*head/kernel": "io"})
    assert overridden["net/head/kernel"].reason == "override"
    recurrent = keras.Sequential([keras.Input((3, 8, 8, 1)), keras.layers.ConvLSTM2D(2, 3)])
    assert gcx.keras.plan(recurrent, layers="conv") == gcx.keras.plan(recurrent)


def test_what_cannot_be_centralized_is_an_error() -> None:
    model, optimizer = kernel_model(), SGD(0.1)
    centralize = gcx.keras.centralize
    with pytest.raises(TypeError, match=r"is a keras.optimizers.Optimizer, not str$"):
        centralize("sgd", model)
    with pytest.raises(ValueError, match="nothing to centralize in net:\nparameter"):
        centralize(optimizer, model, layers="conv")
    with pytest.raises(ValueError, match="decay='inside' needs where='update'"):
        centralize(optimizer, model, decay="inside")
    head = keras.layers.Dense(2, kernel_initializer="ones", dtype="complex64", name="head")
    of_complex = keras.Sequential([keras.Input((3,)), head], name="net")
    with pytest.raises(TypeError, match=r"net/head/kernel: reproducible=True .*complex64"):
        centralize(optimizer, of_complex, reproducible=True)
    assert not isinstance(optimizer, gcx.keras.Centralized)

    class Own(SGD):
        def apply(self, grads: Any, trainable_variables: Any = None) -> None:
            raise AssertionError

    with pytest.raises(TypeError, match=r"Own of Keras .* has a step of its own"):
        centralize(Own(), model)


def test_variables_of_another_model_are_an_error() -> None:
    model, optimizer, built = kernel_model(), SGD(0.1), SGD(0.1)
    gcx.keras.centralize(optimizer, model)
    built.build(variables := small_model().trainable_variables)
    for train in (lambda: optimizer.build(variables), lambda: gcx.keras.centralize(built, model)):
        with pytest.raises(ValueError, match="to train net/conv/kernel, which is not in the model"):
            train()
    assert not isinstance(built, gcx.keras.Centralized)


def test_another_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")
    with pytest.raises(RuntimeError, match="the backend torch or jax, not tensorflow"):
        gcx.keras.centralize(SGD(0.1), kernel_model())


@pytest.mark.skipif(ASKED_BACKEND != "torch", reason="a model is a torch module on torch alone")
def test_gcx_torch_points_here() -> None:
    import torch

    import gcx.torch

    model = small_model()
    sgd = torch.optim.SGD(model.parameters())
    for optimizer, error in ((sgd, ValueError), (keras.optimizers.SGD(), TypeError)):
        with pytest.raises(error, match=r"for keras use gcx\.keras"):
            gcx.torch.centralize(optimizer, model)
    for use in (gcx.keras.plan, lambda sgd: gcx.keras.centralize(sgd, model)):
        with pytest.raises(TypeError, match=r"not torch\.\S+\.SGD; for torch use gcx\.torch"):
            use(sgd)
