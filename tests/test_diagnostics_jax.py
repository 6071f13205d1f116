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

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

CENTRALIZED = {"Dense_0/kernel", "Dense_1/kernel"}


def new_params(dtype: str = "float64") -> dict[str, Any]:
    return {
        "Dense_0": {"kernel": normal(0, 6, 5, dtype=dtype), "bias": normal(1, 5, dtype=dtype)},
        "Dense_1": {"kernel": normal(2, 5, 4, dtype=dtype)},
        "token": normal(3, 1, 5, dtype=dtype),
        "unused": {"kernel": normal(4, 2, 2, dtype=dtype)},
    }


def new_batches(*sizes: int, dtype: str = "float64") -> list[Any]:
    return [normal(k, n, 6, dtype=dtype) for k, n in enumerate(sizes)]


def loss_of(params: dict[str, Any], x: Any) -> Any:
    first = params["Dense_0"]
    hidden = jnp.tanh(x @ first["kernel"] + first["bias"] + params["token"])
    return ((hidden @ params["Dense_1"]["kernel"] - 1) ** 2).mean()


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
    kernel, x = normal(0, 3, 2) + 1j * normal(1, 3, 2), normal(2, 4, 3)

    def loss(params: Any, x: Any) -> Any:
        return jnp.mean(jnp.abs(x @ params["kernel"] - 1) ** 2)

    report = energy_removed({"kernel": kernel}, [x], loss, layouts="flax")
    grads = jax.grad(loss)({"kernel": kernel}, x)
    expected = gcx.diagnostics.energy_removed([grads], layouts="...o")
    assert share(report, "kernel") == pytest.approx(share(expected, "kernel"), rel=1e-12)


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


def test_a_loss_that_is_no_number() -> None:
    outputs: list[Callable[[Any], Any]] = [lambda y: y[None], lambda y: (y, {}), lambda _: None]
    for output in outputs:
        with pytest.raises(TypeError, match="scalar-output"):
            energy_removed(
                new_params(),
                new_batches(4),
                lambda params, x, output=output: output(loss_of(params, x)),
                layouts="flax",
            )


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="no array of floating dtype in params"):
        energy_removed({"step": jnp.asarray(1)}, new_batches(4), loss_of, layouts={"*": "o..."})
