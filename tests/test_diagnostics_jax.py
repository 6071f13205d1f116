"""`gcx.diagnostics.jax`: the gradients that training would have, of any tree of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gcx.diagnostics
import gcx.optax
from gcx.diagnostics import EnergyReport, Share
from gcx.diagnostics.jax import energy_removed

from optax_training import normal
from reference import fan_in_means

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

CENTRALIZED = {"Conv_0/kernel", "Dense_0/kernel", "query/kernel"}


def new_params(dtype: str = "float64") -> dict[str, Any]:
    return {
        "Conv_0": {"kernel": normal(0, 3, 2, 4, dtype=dtype), "bias": normal(1, 4, dtype=dtype)},
        "query": {"kernel": normal(2, 4, 2, 3, dtype=dtype)},
        "Dense_0": {"kernel": normal(3, 6, 5, dtype=dtype), "bias": normal(4, 5, dtype=dtype)},
        "token": normal(5, 1, 4, dtype=dtype),
        "unused": {"kernel": normal(6, 2, 2, dtype=dtype)},
    }


def new_batches(*sizes: int, dtype: str = "float64") -> list[Any]:
    return [(normal(k, n, 7, 2, dtype=dtype), jnp.arange(n) % 5) for k, n in enumerate(sizes)]


def loss_of(params: dict[str, Any], batch: Any) -> Any:
    x, labels = batch
    conv = params["Conv_0"]
    windows = jnp.stack([x[:, k : k + 3] for k in range(5)], 1)
    x = jax.nn.relu(jnp.einsum("bwki,kio->bwo", windows, conv["kernel"]) + conv["bias"])
    x = (x + params["token"]).mean(1)
    x = jnp.einsum("be,ehd->bhd", x, params["query"]["kernel"]).reshape(len(x), -1)
    dense = params["Dense_0"]
    logits = jax.nn.log_softmax(jax.nn.relu(x) @ dense["kernel"] + dense["bias"])
    return -jnp.take_along_axis(logits, labels[:, None], 1).mean()


def share(report: EnergyReport, name: str) -> Share:
    found = {row.name: row.share for row in report.rows}[name]
    assert found is not None
    return found


def reasons(report: EnergyReport) -> dict[str, str]:
    return {row.name: row.reason for row in report.rows}


@pytest.mark.parametrize(
    ("x64", "dtype", "sizes"),
    [
        *[(x64, dtype, (8, 8)) for x64 in (True, False) for dtype in ("float32", "bfloat16")],
        (True, "float64", (8, 3)),
    ],
)
def test_shares_are_those_of_the_gradients(x64: bool, dtype: str, sizes: tuple[int, ...]) -> None:
    """Summed in double precision, whether JAX has it or not."""
    jax.config.update("jax_enable_x64", x64)
    try:
        params, batches = new_params(dtype), new_batches(*sizes, dtype=dtype)
        report = energy_removed(params, iter(batches), loss_of, layouts="flax")
        gradients = jax.jit(jax.grad(loss_of))
        grads = [gradients(params, batch) for batch in batches]
    finally:
        jax.config.update("jax_enable_x64", True)
    wide = jax.tree.map(lambda g: np.asarray(g, float), grads)
    layouts = {row.name: row.layout for row in gcx.optax.plan(params, "flax")}
    expected = gcx.diagnostics.energy_removed(wide, layouts=layouts)
    rel = 1e-9 if dtype == "float64" else 1e-12
    for name in CENTRALIZED:
        found = share(report, name)
        assert found == pytest.approx(share(expected, name), rel=rel)
        assert found.lowest < found.removed < found.highest
    assert report.total == pytest.approx(expected.total, rel=rel)


def test_rows_are_those_of_the_plan() -> None:
    params = new_params()
    report = energy_removed(params, new_batches(4), loss_of, layouts="flax")
    plan = gcx.optax.plan(params, "flax")
    assert [row[:3] for row in report.rows] == [row[:3] for row in plan]
    assert {row.name for row in report.rows if row.share is not None} == CENTRALIZED
    told = reasons(report)
    assert told["unused/kernel"] == "guess by name: kernel; zero gradient"
    assert {text for text in told.values() if "unknown" in text} == {
        "unknown: no rule for this name"
    }


def test_complex_weights() -> None:
    kernel = normal(0, 3, 2) + 1j * normal(1, 3, 2)

    def loss(params: Any, x: Any) -> Any:
        return jnp.mean(jnp.abs(x @ params["kernel"] - 1) ** 2)

    report = energy_removed({"kernel": kernel}, [normal(2, 4, 3)], loss, layouts="flax")
    grad = np.asarray(jax.grad(loss)({"kernel": kernel}, normal(2, 4, 3))["kernel"])
    expected = 3 * np.sum(np.abs(fan_in_means(grad, (0,))) ** 2) / np.sum(np.abs(grad) ** 2)
    assert share(report, "kernel").removed == pytest.approx(expected, rel=1e-12)


def test_what_is_not_finite_is_told() -> None:
    params = {"kernel": normal(0, 2, 3)}

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(x @ params["kernel"])

    batches = [jnp.ones((1, 2)), jnp.full((1, 2), jnp.nan), jnp.full((1, 2), jnp.inf)]
    report = energy_removed(params, batches, loss, layouts="flax")
    assert reasons(report) == {
        "kernel": "guess by name: kernel; NaN or infinity in the gradient of 2 of 3 batches"
    }
    assert report.total is None


def test_what_is_not_trained_stays_as_it_is() -> None:
    params = {"kernel": normal(0, 2, 3), "step": jnp.asarray(4), "none": None, "scale": 2.0}

    def loss(params: Any, x: Any) -> Any:
        assert params["none"] is None
        assert params["scale"] == 2.0
        return jnp.sum(params["scale"] * x @ params["kernel"]) ** params["step"]

    report = energy_removed(params, [normal(1, 4, 2)], loss, layouts={"*": "...o"})
    assert {name: text for name, text in reasons(report).items() if name != "kernel"} == {
        "none": "not an array",
        "scale": "not an array",
        "step": "not of floating dtype",
    }
    assert report.total == share(report, "kernel")


def test_parameters_and_batches_are_not_touched() -> None:
    params, batches = new_params(), new_batches(4)
    before = jax.tree.map(np.array, (params, batches))
    energy_removed(params, batches, loss_of, layouts="flax")
    jax.tree.map(np.testing.assert_array_equal, (params, batches), before)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda y: y, r"one number, without axes; not an array of shape \(4,\)"),
        (lambda y: y[:1], r"not an array of shape \(1,\)"),
        (lambda y: (y.sum(), {}), r"not \("),
        (lambda _: None, r"not None"),
    ],
)
def test_a_loss_that_is_no_number(output: Callable[[Any], Any], message: str) -> None:
    def loss(params: Any, batch: Any) -> Any:
        return output(loss_of(params, batch) * jnp.ones(4))

    with pytest.raises(TypeError, match=message):
        energy_removed(new_params(), new_batches(4), loss, layouts="flax")


def test_errors() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        energy_removed(new_params(), [], loss_of, layouts="flax")
    with pytest.raises(ValueError, match="no array of floating dtype in params"):
        energy_removed({"step": jnp.asarray(1)}, new_batches(4), loss_of, layouts={"*": "o..."})
    with pytest.raises(ValueError, match="no preset 'torch'"):
        energy_removed(new_params(), new_batches(4), loss_of, layouts="torch")
