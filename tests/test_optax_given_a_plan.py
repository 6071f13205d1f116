"""A plan as the layouts of gcx.optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gcx.optax
from gcx import Layout
from gcx.plan import LeaveAlone, Plan, PlanRow

from reference import centralized

PARAMS = {
    "conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
    "head": {"kernel": jnp.ones((6, 2))},
    "heads": {"kernel": jnp.ones((2, 3, 4))},
    "steps": jnp.ones((2, 2), int),
    "absent": None,
}
LAYOUTS = {
    "conv/kernel": "...o",
    "head/kernel": LeaveAlone("learned alone"),
    "heads/kernel": Layout("(bo)i...", b=1),
}
PLAN = gcx.optax.plan(PARAMS, LAYOUTS)
GRADS = jax.tree.map(
    lambda x: jnp.asarray(np.random.default_rng(x.size).standard_normal(x.shape), x.dtype), PARAMS
)


def test_plan_of_a_plan_is_equal() -> None:
    assert {row.name for row in PLAN if row.layout is not None} == {"conv/kernel", "heads/kernel"}
    assert PLAN["head/kernel"].reason == "learned alone"
    assert gcx.optax.plan(PARAMS, PLAN) == PLAN


@pytest.mark.parametrize("run", [lambda update: update, jax.jit], ids=["eager", "jit"])
def test_updates_follow_the_plan(run: Any) -> None:
    transformation = gcx.optax.centralize(PLAN)
    update = run(transformation.update)
    updates, _ = update(GRADS, transformation.init(PARAMS))
    kernel = GRADS["conv"]["kernel"]
    np.testing.assert_allclose(
        updates["conv"]["kernel"], centralized(kernel, (0, 1, 2)), rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(
        updates["heads"]["kernel"], centralized(GRADS["heads"]["kernel"], (1, 2)), rtol=0, atol=1e-6
    )
    np.testing.assert_array_equal(updates["head"]["kernel"], GRADS["head"]["kernel"])
    np.testing.assert_array_equal(updates["conv"]["bias"], GRADS["conv"]["bias"])
    np.testing.assert_array_equal(updates["steps"], GRADS["steps"])


@pytest.mark.parametrize("run", [lambda update: update, jax.jit], ids=["eager", "jit"])
def test_masked_leaves_are_not_asked_for(run: Any) -> None:
    mask = jax.tree.map(lambda _: False, PARAMS) | {"conv": {"kernel": True, "bias": True}}
    masked = optax.masked(gcx.optax.centralize(PLAN), mask)
    updates, _ = run(masked.update)(GRADS, masked.init(PARAMS))
    assert not np.array_equal(updates["conv"]["kernel"], GRADS["conv"]["kernel"])
    np.testing.assert_array_equal(updates["heads"]["kernel"], GRADS["heads"]["kernel"])
    # A plan of the leaves that are visible is enough.
    visible = Plan(row for row in PLAN if row.name.startswith("conv/"))
    again = optax.masked(gcx.optax.centralize(visible), mask)
    np.testing.assert_array_equal(
        again.update(GRADS, again.init(PARAMS))[0]["conv"]["kernel"], updates["conv"]["kernel"]
    )


def test_parameter_that_the_plan_lacks() -> None:
    shorter = Plan(row for row in PLAN if row.name != "conv/bias")
    with pytest.raises(
        ValueError, match=r"layouts: the plan has no row 'conv/bias'; the nearest are 'steps'"
    ):
        gcx.optax.centralize(shorter).init(PARAMS)
    with pytest.raises(ValueError, match="the plan has no row 'conv/bias'"):
        gcx.optax.plan(PARAMS, shorter)


def test_parameter_of_another_shape() -> None:
    other = Plan([PlanRow("kernel", (3, 4), Layout("io"), "Linear")])
    message = r"kernel: the plan is for shape \(3, 4\), this array has shape \(4, 3\)"
    with pytest.raises(ValueError, match=message):
        gcx.optax.centralize(other).init({"kernel": jnp.ones((4, 3))})
