"""Models and optimizers that gcx.keras centralizes are saved, and go on after they are loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when Keras is imported, here or by gcx

import keras

import gcx.keras

from keras_support import (
    SGD,
    Adam,
    LossScale,
    assert_fit_keeps_the_means,
    assert_means_kept,
    assert_same_weights,
    centralized_model,
    fit,
    kernel_model,
    kernels,
    small_model,
    step,
)

pytestmark = pytest.mark.usefixtures("compiled_in_haste")  # on JAX


def test_a_loss_scale_is_saved_with_its_optimizer(where: Any, tmp_path: Path) -> None:
    model = small_model(optimizer=LossScale(SGD(0.01, momentum=0.9)))
    start = kernels(model)
    handle = gcx.keras.centralize(model.optimizer, model, where=where)
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    inner = loaded.optimizer.inner_optimizer
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


def stepped(*, is_loaded: bool = True, **options: Any) -> Any:
    """A kernel after a step of an optimizer that may be loaded."""
    model, optimizer = kernel_model(1000), SGD(0.5)
    gcx.keras.centralize(optimizer, model, **options)
    if is_loaded:
        optimizer = gcx.keras.Centralized.from_config(optimizer.get_config())
    step(optimizer, model, LONG)
    return kernels(model)["head"]


@pytest.mark.parametrize("options", [{"strength": 0.5}, {"reproducible": True}], ids=str)
def test_options_are_saved(options: dict[str, Any]) -> None:
    loaded = stepped(**options)
    np.testing.assert_array_equal(loaded, stepped(is_loaded=False, **options))
    assert not np.array_equal(loaded, stepped())


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_loading_without_gcx_is_an_error(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    centralized_model(kind(0.01)).save(tmp_path / "model.keras")
    monkeypatch.delitem(keras.saving.get_custom_objects(), "gcx>Centralized")
    with pytest.raises(TypeError, match=f"Could not locate class 'Centralized{kind.__name__}'"):
        keras.saving.load_model(tmp_path / "model.keras")


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
