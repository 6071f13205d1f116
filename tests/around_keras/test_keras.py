"""gcx.keras in training: fit and loops of one's own, every option of an optimizer, saving."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when Keras is imported, here or by gcx

import keras
from sklearn.datasets import load_digits

import gcx.keras
from gcx.testing import assert_centralized

import reference
from keras_support import ASKED_BACKEND, to_numpy

SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam
LossScale = keras.optimizers.LossScaleOptimizer
PIXELS, DIGITS = load_digits(return_X_y=True)
IMAGES = (PIXELS[:48] / 16).reshape(-1, 8, 8, 1).astype("float32")
LABELS = DIGITS[:48]
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def small_model(**compiling: Any) -> Any:
    """A convolution, a norm and a dense layer, always with the same weights."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, name="conv"),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dense(10, name="head"),
        ],
        name="net",
    )
    if compiling:
        model.compile(loss=LOSS, **compiling)
    return model


def centralized_model(optimizer: Any, *, run_eagerly: bool = False, **options: Any) -> Any:
    model = small_model(optimizer=optimizer, run_eagerly=run_eagerly)
    gcx.keras.centralize(optimizer, model, **options)
    return model


def fit(model: Any, epochs: int = 2) -> None:
    model.fit(IMAGES, LABELS, batch_size=16, epochs=epochs, shuffle=False, verbose=0)


def kernels(model: Any) -> dict[str, Any]:
    """Kernels by the names of their layers."""
    found = [v for v in model.trainable_variables if v.name == "kernel"]
    return {v.path.split("/")[-2]: to_numpy(v) for v in found}


def assert_means_kept(model: Any, start: dict[str, Any]) -> None:
    """Corollary 4.1, which also fails if nothing was trained."""
    for path, kernel in kernels(model).items():
        assert_centralized(kernel, start=start[path], layout="...o", rtol=1e-5)


def assert_fit_keeps_the_means(model: Any, epochs: int = 2) -> None:
    start = kernels(model)
    fit(model, epochs)
    assert_means_kept(model, start)


def assert_same_weights(model: Any, other: Any) -> None:
    for mine, theirs in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(mine), to_numpy(theirs), err_msg=mine.path)


def test_the_backend_that_was_asked_for_runs() -> None:
    assert keras.backend.backend() == ASKED_BACKEND
    assert ASKED_BACKEND in ("torch", "jax")


class GCRMSprop(keras.optimizers.RMSprop):
    """The recipe of keras.io: nothing in Keras 3 calls get_gradients."""

    def get_gradients(self, loss: Any, params: Any) -> Any:
        raise AssertionError


def test_the_well_known_recipe_does_nothing() -> None:
    recipe = small_model(optimizer=GCRMSprop(1e-3))
    plain = small_model(optimizer=keras.optimizers.RMSprop(1e-3))
    if ASKED_BACKEND == "torch":  # a subclass does not get the steps that Keras has for torch
        plain.optimizer.__class__ = type("Subclass", (keras.optimizers.RMSprop,), {})
    fit(recipe)
    fit(plain)
    assert_same_weights(recipe, plain)


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 3},
    "clipnorm": {"clipnorm": 1e-2},
    "global_clipnorm": {"global_clipnorm": 1e-2},
    "clipvalue": {"clipvalue": 1e-3},
    "ema": {"use_ema": True, "ema_momentum": 0.5},
    "ema overwriting": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
    "ema of accumulated": {"use_ema": True, "gradient_accumulation_steps": 2},
    "loss_scale_factor": {"loss_scale_factor": 1024.0},
}
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.9)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sgd_keeps_the_means(options: dict[str, Any]) -> None:
    assert_fit_keeps_the_means(centralized_model(SGD(0.01, momentum=0.9, **options)))


def test_eager_steps(where: Any) -> None:
    optimizer = SGD(0.01, momentum=0.9, gradient_accumulation_steps=2)
    assert_fit_keeps_the_means(centralized_model(optimizer, run_eagerly=True, where=where))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_any_optimizer_keeps_the_means_in_the_update(options: dict[str, Any]) -> None:
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1, **options)
    assert_fit_keeps_the_means(centralized_model(optimizer, where="update"))


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
    model = centralized_model(optimizer := wraps(SGD(SCHEDULE, momentum=0.9)), where=where)
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


def kernel_model(inputs: int = 5, **options: Any) -> Any:
    """One kernel of size 1, to be given gradients."""
    keras.utils.set_random_seed(1)
    layer = keras.layers.Dense(3, use_bias=False, name="head", **options)
    return keras.Sequential([keras.Input((inputs,)), layer], name="net")


GRAD = np.random.default_rng(2).standard_normal((5, 3)).astype("float32")


def step(optimizer: Any, model: Any, grad: Any = GRAD) -> None:
    tensor = keras.ops.convert_to_tensor(grad)
    optimizer.apply([tensor], model.trainable_variables)


CENTRALIZED = 0.5 * reference.centralized(GRAD, (0,))
CLIPPED = 0.5 * reference.centralized(np.clip(GRAD, -0.5, 0.5), (0,))
# Options of the layer and of SGD, where, and the kernel after a step.
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any], Any, Callable[[Any], Any]]] = {
    "after clipping": ({}, {"clipvalue": 0.5}, "gradient", lambda w: w - CLIPPED),
    "beside decay": ({}, {"weight_decay": 0.1}, "gradient", lambda w: w * 0.95 - CENTRALIZED),
    "before a constraint": (
        {"kernel_constraint": "non_neg"},
        {},
        "update",
        lambda w: np.maximum(w - CENTRALIZED, 0),
    ),
}


@pytest.mark.parametrize(("of_layer", "of_sgd", "where", "expected"), STEPS.values(), ids=STEPS)
def test_a_step_is_centralized(of_layer: Any, of_sgd: Any, where: Any, expected: Any) -> None:
    model = kernel_model(**of_layer)
    (start,) = kernels(model).values()
    optimizer = SGD(0.5, **of_sgd)
    gcx.keras.centralize(optimizer, model, where=where)
    step(optimizer, model)
    np.testing.assert_allclose(*kernels(model).values(), expected(start), rtol=0, atol=1e-6)


def test_the_gradient_that_is_given_stays_as_it_is() -> None:
    model = kernel_model()
    optimizer = SGD(1.0)
    gcx.keras.centralize(optimizer, model)
    grad = keras.ops.convert_to_tensor(GRAD)
    optimizer.apply([grad], model.trainable_variables)
    np.testing.assert_array_equal(to_numpy(grad), GRAD)


@pytest.mark.parametrize("accumulate", [None, 2])
@pytest.mark.parametrize(("decay", "shrinkage"), [("inside", 1.0), ("outside", 0.95), (None, 1.0)])
def test_decay_is_inside_or_outside(decay: Any, shrinkage: float, accumulate: Any) -> None:
    model = kernel_model()
    (start,) = kernels(model).values()
    optimizer = SGD(0.5, weight_decay=0.1, gradient_accumulation_steps=accumulate)
    gcx.keras.centralize(optimizer, model, where="update", decay=decay)
    for _ in range(accumulate or 1):
        step(optimizer, model)
    rest = reference.centralized(start * 0.95 - 0.5 * GRAD, (0,))
    expected = rest + shrinkage * reference.fan_in_means(start, (0,))
    np.testing.assert_allclose(*kernels(model).values(), expected, rtol=0, atol=1e-6)


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


def test_a_step_that_is_compiled_already_is_compiled_again(where: Any) -> None:
    model = small_model(optimizer=SGD(0.01, momentum=0.9))
    fit(model)
    gcx.keras.centralize(model.optimizer, model, where=where)
    assert_fit_keeps_the_means(model)


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


def test_layers_unfrozen_before_training_are_covered() -> None:
    model = small_model()
    conv = model.get_layer("conv")
    conv.trainable = False
    optimizer = SGD(0.01)
    gcx.keras.centralize(optimizer, model)
    conv.trainable = True
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


def test_reproducible_training_keeps_the_means() -> None:
    optimizer = SGD(0.01, momentum=0.9, weight_decay=0.1)
    options: Any = {"where": "update", "decay": "inside", "reproducible": True}
    assert_fit_keeps_the_means(centralized_model(optimizer, **options))


def test_bits_that_cannot_be_promised_are_an_error() -> None:
    head = keras.layers.Dense(2, kernel_initializer="ones", dtype="complex64", name="head")
    model = keras.Sequential([keras.Input((3,)), head], name="net")
    optimizer = SGD(0.1)
    with pytest.raises(TypeError, match=r"net/head/kernel: reproducible=True .*complex64"):
        gcx.keras.centralize(optimizer, model, reproducible=True)
    assert not isinstance(optimizer, gcx.keras.Centralized)


@pytest.mark.parametrize("wraps", [lambda o: o, LossScale], ids=["alone", "loss scale"])
def test_a_saved_model_goes_on_as_if_it_had_not_been(
    where: Any, wraps: Callable[[Any], Any], tmp_path: Path
) -> None:
    model = small_model(optimizer=wraps(SGD(0.01, momentum=0.9)))
    start = kernels(model)
    handle = gcx.keras.centralize(model.optimizer, model, where=where)
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    inner = getattr(loaded.optimizer, "inner_optimizer", loaded.optimizer)
    assert isinstance(inner, gcx.keras.Centralized)
    assert repr(inner.gradient_centralization) == repr(handle)
    assert inner.gradient_centralization.plan == handle.plan
    fit(loaded)
    fit(model)
    assert_means_kept(loaded, start)
    assert_same_weights(loaded, model)


@pytest.mark.filterwarnings("ignore:Skipping variable loading:UserWarning")  # there are none yet
def test_an_untrained_model_is_saved_with_its_plan(tmp_path: Path) -> None:
    model = small_model(optimizer=Adam(0.01))
    overrides = {"*head/kernel": gcx.Layout("(bi)o", b=2)}
    options: Any = {"where": "update", "decay": "outside", "overrides": overrides}
    handle = gcx.keras.centralize(model.optimizer, model, **options)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.gradient_centralization.plan == handle.plan
    assert_fit_keeps_the_means(loaded)


@pytest.mark.filterwarnings("ignore::UserWarning:keras")  # the format is a legacy one
def test_the_legacy_format_loads_to_predict_and_not_to_train(tmp_path: Path) -> None:
    model = centralized_model(SGD(0.01, momentum=0.9))
    fit(model)
    model.save(tmp_path / "model.h5")
    loaded = keras.saving.load_model(tmp_path / "model.h5")
    assert_same_weights(loaded, model)
    with pytest.raises(ValueError, match=r"Unknown variable|built with 0 variables"):  # of Keras
        fit(loaded)
    loaded = keras.saving.load_model(tmp_path / "model.h5")  # on JAX, the error leaves no weights
    optimizer = SGD(0.01)
    gcx.keras.centralize(optimizer, loaded)
    loaded.compile(optimizer, loss=model.loss)
    assert_fit_keeps_the_means(loaded)


LONG = np.random.default_rng(3).normal(0.3, 1.0, (1000, 3)).astype("float32")


def stepped(*lost: str, is_loaded: bool = True, **options: Any) -> Any:
    """A kernel after a step of an optimizer that is loaded, perhaps from an older config."""
    model, optimizer = kernel_model(1000), SGD(0.5)
    gcx.keras.centralize(optimizer, model, **options)
    if is_loaded:
        config = {k: v for k, v in optimizer.get_config().items() if k not in lost}
        optimizer = gcx.keras.Centralized.from_config(config)
    step(optimizer, model, LONG)
    return kernels(model)["head"]


@pytest.mark.parametrize("options", [{"strength": 0.5}, {"reproducible": True}], ids=str)
def test_options_are_saved_and_configs_without_strength_load(options: dict[str, Any]) -> None:
    loaded, plain = stepped(**options), stepped()
    np.testing.assert_array_equal(loaded, stepped(is_loaded=False, **options))
    assert not np.array_equal(loaded, plain)
    np.testing.assert_array_equal(stepped("strength", strength=0.5), plain)


def test_the_config_of_the_plain_optimizer_is_one_level_down() -> None:
    model, optimizer = kernel_model(), SGD(0.25)
    gcx.keras.centralize(optimizer, model)
    assert optimizer.get_config()["optimizer"]["config"]["learning_rate"] == 0.25


LOAD = """
import keras
for kind in ("SGD", "Adam"):
    try:
        keras.saving.load_model(f"{kind}.keras")
    except TypeError as error:
        print(error)
"""


def test_loading_without_gcx_is_an_error(tmp_path: Path) -> None:
    for kind in ("SGD", "Adam"):
        model = centralized_model(getattr(keras.optimizers, kind)(0.01))
        model.save(tmp_path / f"{kind}.keras")
    environment = {**os.environ, "KERAS_BACKEND": ASKED_BACKEND}
    command = [sys.executable, "-c", LOAD]
    printed = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
    found = re.findall(r"Could not locate class '(\w+)'", printed)
    assert list(dict.fromkeys(found)) == ["CentralizedSGD", "CentralizedAdam"]


def test_a_saved_optimizer_is_for_its_variables() -> None:
    model = kernel_model()
    optimizer = SGD(0.1)
    gcx.keras.centralize(optimizer, model)
    copied = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    other = small_model()
    with pytest.raises(ValueError, match=r"saved for 1 variables of shapes \[\(5, 3\)\]"):
        copied.build(other.trainable_variables)
    (start,) = kernels(model).values()
    step(copied, model)
    assert_means_kept(model, {"head": start})


def test_what_cannot_be_centralized_is_an_error() -> None:
    model, optimizer = kernel_model(), SGD(0.1)
    centralize = gcx.keras.centralize
    with pytest.raises(TypeError, match=r"is a keras.optimizers.Optimizer, not str$"):
        centralize("sgd", model)
    with pytest.raises(ValueError, match="nothing to centralize in net:\nparameter"):
        centralize(optimizer, model, layers="conv")
    with pytest.raises(ValueError, match="decay='inside' needs where='update'"):
        centralize(optimizer, model, decay="inside")
    with pytest.raises(ValueError, match="net has no variables yet"):
        centralize(optimizer, keras.Sequential([keras.layers.Dense(2)], name="net"))
    assert not isinstance(optimizer, gcx.keras.Centralized)


def test_an_optimizer_with_a_step_of_its_own_is_an_error() -> None:
    class Own(SGD):
        def apply(self, grads: Any, trainable_variables: Any = None) -> None:
            raise AssertionError

    with pytest.raises(TypeError, match=r"Own of Keras .* has a step of its own"):
        gcx.keras.centralize(Own(), kernel_model())


def test_variables_of_another_model_are_an_error() -> None:
    model, optimizer = kernel_model(), SGD(0.1)
    gcx.keras.centralize(optimizer, model)
    other = small_model()
    with pytest.raises(ValueError, match="to train net/conv/kernel, which is not in the model"):
        optimizer.build(other.trainable_variables)
    built = SGD(0.1)
    built.build(other.trainable_variables)
    with pytest.raises(ValueError, match="which is not in the model"):
        gcx.keras.centralize(built, model)
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
