"""gcx.optax on plain parameter trees."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gcx
import gcx.optax
from gcx import Layout

from optax_training import KERNELS, normal, struct
from reference import centralized


class WithList:
    """A node whose structure cannot be hashed."""

    def __init__(self, static: list[int], weight: Any) -> None:
        self.static, self.weight = static, weight


jax.tree_util.register_pytree_with_keys(
    WithList,
    lambda node: ([(jax.tree_util.GetAttrKey("weight"), node.weight)], node.static),
    lambda static, leaves: WithList(static, *leaves),
)


GC = gcx.optax.centralize("flax")
REPRODUCIBLE = gcx.optax.centralize("flax", reproducible=True)


def test_reproducible_is_refused_for_other_dtypes_and_a_fan_in_that_is_split() -> None:
    params = {"kernel": struct(3, 2, dtype="complex64"), "bias": struct(2, dtype="int32")}
    with pytest.raises(TypeError, match=r"^kernel: reproducible=True is for .*complex64"):
        REPRODUCIBLE.init(params)
    params = {"a": {"kernel": jnp.ones((4, 2))}, "b": {"kernel": jnp.ones((4, 2))}}
    names = {"a/kernel": None, "b/kernel": "x"}
    transform = gcx.optax.centralize("flax", axis_name=names, reproducible=True)
    with pytest.raises(TypeError, match=r"b/kernel: reproducible=True .* over \('x',\)"):
        transform.init(params)
    with pytest.raises(TypeError, match=r"b/kernel: reproducible=True"):
        transform.update(params, optax.EmptyState())
    del params["b"], names["b/kernel"]
    transform = gcx.optax.centralize("flax", axis_name=names, reproducible=True)
    updates, _ = transform.update(params, transform.init(params))
    assert not np.any(updates["a"]["kernel"])


@pytest.mark.parametrize("optimizer", [GC, REPRODUCIBLE])
def test_has_no_state_and_takes_shapes(optimizer: Any) -> None:
    state = optimizer.init(KERNELS)
    _, after = optimizer.update(KERNELS, state)
    shapes = jax.tree.map(lambda x: struct(*x.shape, dtype="float16"), KERNELS)
    abstract = jax.eval_shape(optimizer.init, shapes)
    assert state == after == optimizer.init(shapes) == abstract == optax.EmptyState()


def test_optax_may_ask_for_a_state_without_params() -> None:
    optimizer = optax.chain(gcx.optax.centralize({"*kernel": "...o"}), optax.adam(0.1))
    state = optimizer.init(KERNELS)
    halved = optax.tree_map_params(optimizer, lambda leaf: leaf + 1.0, state)
    assert jax.tree.structure(halved) == jax.tree.structure(state)


def test_steps_outside_jit_plan_once_for_each_form_of_the_gradients() -> None:
    seen = []

    def first_axis_is_output(name: str, array: Any) -> str:
        seen.append(name)
        return "o" + "i" * (array.ndim - 1)

    update = gcx.optax.centralize(first_axis_is_output).update
    trees = [
        {"a": normal(1, 3, 2)},
        {"a": normal(2, 3, 2)},
        {"a": normal(3, 2, 5)},
        {"a": normal(4, 2, 3, 2)},
        {"b": normal(5, 3, 2)},
        {"a": normal(6, 3, 2).astype("float32")},
    ]
    trees_of_many_sizes = [{"c": normal(size, 2, size)} for size in range(2, 14)]
    for grads in [*trees, *trees, *trees_of_many_sizes, *trees_of_many_sizes]:
        updates, _ = update(grads, optax.EmptyState())
        for name, grad in grads.items():
            expected = centralized(grad, tuple(range(1, grad.ndim)))
            np.testing.assert_allclose(updates[name], expected, atol=1e-6)
    assert seen[:5] == ["a", "a", "a", "b", "a"]
    assert set(seen[5:]) == {"c"}


def test_a_layout_that_splits_an_axis_is_not_for_shards() -> None:
    layouts = {"weight": Layout("(bi)o...", b=2)}
    update = gcx.optax.centralize(layouts, axis_name="d").update
    sharded = jax.vmap(lambda g: update(g, optax.EmptyState())[0], axis_name="d")
    with pytest.raises(ValueError, match=r"^weight: Layout\(.* splits an axis of the whole weight"):
        sharded({"weight": normal(1, 1, 8, 3)})


def test_structures_need_not_be_hashable() -> None:
    update = gcx.optax.centralize({"weight": "o..."}).update
    for seed in (1, 2):
        grads = WithList([1, 2], normal(seed, 2, 3))
        updates, _ = update(grads, optax.EmptyState())
        np.testing.assert_allclose(updates.weight, centralized(grads.weight, (1,)), atol=1e-15)


def test_a_mapping_that_changes_later_changes_nothing() -> None:
    layouts: dict[str, Any] = {"kernel": "...o"}
    update = gcx.optax.centralize(layouts).update
    layouts["kernel"] = None
    grads = {"kernel": normal(1, 3, 2)}
    updates, _ = update(grads, optax.EmptyState())
    np.testing.assert_allclose(updates["kernel"], centralized(grads["kernel"], (0,)), atol=1e-15)


# --- leaves of every kind -------------------------------------------------------------------------


def test_leaves_of_integers_and_none_pass() -> None:
    params = {"kernel": normal(1, 4, 2), "seen": jnp.arange(4), "table": None}
    state = GC.init(params)

    def loss(p: Any) -> Any:
        return jnp.sum(p["kernel"][p["seen"]] ** 2)

    grads = jax.grad(loss, allow_int=True)(params)
    assert grads["seen"].dtype == jax.dtypes.float0
    updates, _ = GC.update(grads, state, params)
    assert updates["seen"] is grads["seen"]
    assert updates["table"] is None
    expected = centralized(grads["kernel"], (0,))
    np.testing.assert_allclose(updates["kernel"], expected, atol=1e-15)
