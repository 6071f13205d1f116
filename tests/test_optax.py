"""gcx.optax on trees of parameters, and inside the transformations of optax and JAX."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import gcx.optax
from gcx import Layout
from gcx.testing import assert_centralized

from optax_training import (
    FIRST_ONLY,
    KERNELS,
    LEARNING_RATE,
    SGD,
    START,
    normal,
    normal_like,
    struct,
    train,
    two_layers,
)
from reference import centralized, fan_in_means


@jax.tree_util.register_dataclass
@dataclass
class WithList:
    """A node whose structure cannot be hashed."""

    weight: Any
    static: list[int] = field(metadata={"static": True})


GC = gcx.optax.centralize("flax")
REPRODUCIBLE = gcx.optax.centralize("flax", reproducible=True)


def test_reproducible_is_refused_for_other_dtypes() -> None:
    params = {"kernel": struct(3, 2, dtype="complex64"), "bias": struct(2, dtype="int32")}
    with pytest.raises(TypeError, match=r"^kernel: reproducible=True is for .*complex64"):
        REPRODUCIBLE.init(params)


@pytest.mark.parametrize("optimizer", [GC, REPRODUCIBLE])
def test_has_no_state_and_takes_shapes(optimizer: Any) -> None:
    state = optimizer.init(KERNELS)
    _, after = optimizer.update(KERNELS, state)
    shapes = jax.tree.map(lambda x: struct(*x.shape, dtype="float16"), KERNELS)
    abstract = jax.eval_shape(optimizer.init, shapes)
    assert state == after == optimizer.init(shapes) == abstract == optax.EmptyState()


@pytest.mark.parametrize("name", ["*kernel", "Dense_0/kernel"])
def test_optax_may_ask_for_a_state_without_params(name: str) -> None:
    optimizer = optax.chain(gcx.optax.centralize({name: "...o", "*": None}), optax.adam(0.1))
    state = optimizer.init(KERNELS)
    halved = optax.tree_map_params(optimizer, lambda leaf: leaf + 1.0, state)
    assert jax.tree.structure(halved) == jax.tree.structure(state)


def test_steps_outside_jit_plan_once_for_each_form_of_the_gradients() -> None:
    seen = []

    def first_axis_is_output(name: str, array: Any) -> str:
        seen.append(name)
        return "o" + "i" * (array.ndim - 1)

    update = gcx.optax.centralize(first_axis_is_output).update
    first = normal(1, 3, 2)
    others = normal(2, 2, 5), normal(3, 2, 3, 2), first.astype("float32")
    trees = [{"a": first}, {"a": 2 * first}, *({"a": grad} for grad in others), {"b": first}]
    for grads in [*trees, *trees]:
        updates, _ = update(grads, optax.EmptyState())
        for name, grad in grads.items():
            expected = centralized(grad, tuple(range(1, grad.ndim)))
            np.testing.assert_allclose(updates[name], expected, atol=1e-6)
    assert seen == ["a", "a", "a", "a", "b"]


def test_structures_need_not_be_hashable() -> None:
    update = gcx.optax.centralize({"weight": "o..."}).update
    for seed in (1, 2):
        grads = WithList(normal(seed, 2, 3), [1, 2])
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
    params = {"kernel": normal(1, 4, 2), "seen": jnp.arange(4), "table": None, "scale": 1.0}
    state = GC.init(params)

    def loss(p: Any) -> Any:
        return jnp.sum(p["kernel"][p["seen"]] ** 2)

    grads = jax.grad(loss, allow_int=True)(params)
    assert grads["seen"].dtype == jax.dtypes.float0
    grads["scale"] = SimpleNamespace(dtype="float32")  # as JAX's own floats, without a shape
    updates, _ = GC.update(grads, state, params)
    assert updates["scale"] is grads["scale"]
    assert updates["seen"] is grads["seen"]
    assert updates["table"] is None
    expected = centralized(grads["kernel"], (0,))
    np.testing.assert_allclose(updates["kernel"], expected, atol=1e-15)


# --- inside the other transformations -------------------------------------------------------------

LABELS = jax.tree.map(lambda first: "gc" if first else "plain", FIRST_ONLY)

# What wraps the transformation.
WRAPPERS: dict[str, Any] = {
    "chain": lambda c: optax.chain(c, SGD),
    "masked, the first alone": lambda c: optax.chain(optax.masked(c, FIRST_ONLY), SGD),
    "multi_transform, the first alone": lambda c: optax.multi_transform(
        {"gc": optax.chain(c, SGD), "plain": SGD}, LABELS
    ),
    "inject_hyperparams": lambda c: optax.inject_hyperparams(
        lambda lr: optax.chain(c, optax.sgd(lr))
    )(lr=0.1),
    "MultiSteps": lambda c: optax.MultiSteps(optax.chain(c, SGD), every_k_schedule=1),
    "apply_if_finite": lambda c: optax.apply_if_finite(optax.chain(c, SGD), 3),
}
SAME_BY_PATH: dict[str, Any] = {
    "preset": "flax",
    "mapping": {"Dense_0/kernel": "...o", "Dense_1/kernel": Layout("...o"), "*": None},
    "function": lambda path, array: "...o" if path.endswith("kernel") else None,
    "plan": gcx.optax.plan(KERNELS, "flax"),
}


@pytest.mark.parametrize("layouts", SAME_BY_PATH.values(), ids=SAME_BY_PATH)
@pytest.mark.parametrize("name", WRAPPERS)
def test_works_inside(name: str, layouts: Any) -> None:
    optimizer = WRAPPERS[name](gcx.optax.centralize(layouts))
    names = ("Dense_0",) if "first" in name else ("Dense_0", "Dense_1")
    grads = normal_like(30, KERNELS)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(KERNELS), KERNELS)
    for key, layer in grads.items():
        kernel = layer["kernel"]
        expected = centralized(kernel, (0,)) if key in names else kernel
        np.testing.assert_allclose(updates[key]["kernel"], -0.1 * expected, atol=1e-15)
        np.testing.assert_allclose(updates[key]["bias"], -0.1 * layer["bias"], atol=1e-15)


def means_stay(end: Any) -> None:
    """Corollary 4.1 for the kernels of `two_layers`, which have moved."""
    for name, layer in START.items():
        assert_centralized(end[name]["kernel"], start=layer["kernel"], layout="...o")


ADAM = optax.adam(LEARNING_RATE, b1=0.0)
MOMENTUM = optax.sgd(LEARNING_RATE, momentum=0.9)
CLIP, NESTEROV = optax.clip_by_global_norm(5.0), optax.sgd(0.02, momentum=0.9, nesterov=True)

# What keeps the means of the weights, wherever it keeps other weights in its state.
KEPT_BY: dict[str, Any] = {
    "clipping, nesterov": optax.chain(CLIP, GC, NESTEROV),
    "decay": optax.chain(optax.add_decayed_weights(0.1), GC, MOMENTUM),
    "adamw": optax.chain(optax.adamw(LEARNING_RATE, weight_decay=0.1), GC),
    "ema": optax.chain(GC, optax.ema(0.9), optax.sgd(LEARNING_RATE)),
    "contrib.muon": optax.chain(GC, optax.contrib.muon(LEARNING_RATE)),
    "MultiSteps": optax.MultiSteps(optax.chain(GC, optax.sgd(LEARNING_RATE)), 2),
    "contrib.sam": optax.chain(optax.contrib.sam(optax.adam(0.1), SGD), GC),
    "lbfgs": optax.chain(GC, optax.lbfgs()),
    "contrib.mechanize": optax.chain(optax.contrib.mechanize(ADAM, s_init=0.1), GC),
}
if hasattr(optax.contrib, "madgrad"):  # newer than the oldest optax that gcx takes
    KEPT_BY["contrib.madgrad"] = optax.chain(optax.contrib.madgrad(0.1), GC)


@pytest.mark.parametrize("name", KEPT_BY)
def test_optimizers_that_keep_the_means(name: str) -> None:
    end, _ = train(KEPT_BY[name], two_layers, START, steps=12, searches=name == "lbfgs")
    means_stay(end)
    assert two_layers(end) < two_layers(START)


def schedule_free(optimizer: Any) -> Any:
    return optax.contrib.schedule_free(optimizer, LEARNING_RATE)


# The optimizer, and the place of the schedule-free state in its state.
SCHEDULE_FREE: dict[str, tuple[Any, Any]] = {
    "inside, update": (schedule_free(optax.chain(ADAM, GC)), lambda state: state),
    "inside, gradient": (schedule_free(optax.chain(GC, SGD)), lambda state: state),
    "before": (optax.chain(GC, schedule_free(SGD)), lambda state: state[1]),
    "after": (optax.chain(schedule_free(ADAM), GC), lambda state: state[0]),
}


@pytest.mark.parametrize("case", SCHEDULE_FREE)
def test_means_of_the_weights_that_schedule_free_evaluates(case: str) -> None:
    optimizer, own = SCHEDULE_FREE[case]
    params, state = train(optimizer, two_layers, START, steps=12)
    means_stay(params)
    evaluated = optax.contrib.schedule_free_eval_params(own(state), params)
    if case != "after":
        means_stay(evaluated)
    else:  # as documented: the second sequence has moved without GC
        drift = fan_in_means(evaluated["Dense_0"]["kernel"] - START["Dense_0"]["kernel"], (0,))
        assert np.abs(drift).max() > 1e-2


@pytest.mark.parametrize("inside", [True, False])
def test_slow_and_fast_weights_keep_the_means(inside: bool) -> None:
    params = optax.LookaheadParams.init_synced(START)
    optimizer = optax.lookahead(optax.chain(ADAM, GC) if inside else ADAM, 3, 0.5)
    optimizer = optimizer if inside else optax.chain(optimizer, GC)
    state = optimizer.init(params)
    for _ in range(12):
        updates, state = optimizer.update(jax.grad(two_layers)(params.fast), state, params)
        params = optax.apply_updates(params, updates)
    means_stay(params.fast)
    means_stay(params.slow)


# --- inside the transformations of JAX ------------------------------------------------------------

PAPER = optax.chain(GC, MOMENTUM)


def step_of_paper(params: Any, state: Any) -> Any:
    updates, state = PAPER.update(jax.grad(two_layers)(params), state, params)
    return optax.apply_updates(params, updates), state


def test_steps_in_scan_and_with_donated_buffers_are_the_same() -> None:
    expected, _ = train(PAPER, two_layers, START, steps=6)
    start = jax.tree.map(jnp.asarray, START)
    (scanned, _), _ = lax.scan(
        lambda carry, _: (step_of_paper(*carry), None), (start, PAPER.init(start)), length=6
    )
    donating = jax.jit(step_of_paper, donate_argnums=(0, 1))
    params, state = start, PAPER.init(start)
    for _ in range(6):
        params, state = donating(params, state)
    for found in (scanned, params):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), found, expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start))


def test_members_of_an_ensemble_are_trained_apart() -> None:
    ensemble = jax.tree.map(lambda a: jnp.stack([a, 2 * a, -a]), START)
    found, _ = jax.vmap(step_of_paper)(ensemble, jax.vmap(PAPER.init)(ensemble))
    for k in range(3):
        member = jax.tree.map(lambda a, k=k: a[k], ensemble)
        expected, _ = step_of_paper(member, PAPER.init(member))
        jax.tree.map(
            lambda a, b, k=k: np.testing.assert_allclose(a[k], b, rtol=1e-12), found, expected
        )


def test_inject_hyperparams_of_the_transformation_itself() -> None:
    inject = optax.inject_hyperparams(gcx.optax.centralize, static_args=("layouts", "strength"))
    optimizer = inject("flax", strength=0.5)
    grads = {"kernel": jnp.array([[1.0], [3.0]])}
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    assert updates["kernel"].tolist() == [[0.0], [2.0]]
    dynamic = optax.inject_hyperparams(gcx.optax.centralize)("flax", strength=0.5)
    with pytest.raises(TypeError, match=r"strength is a Python number, not a \w+: .* static"):
        dynamic.init(grads)


def loss_of_example(params: Any, x: Any) -> Any:
    return jnp.sum(jnp.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]))


@pytest.mark.parametrize("layouts", ["flax", {"*kernel": "io", "*": None}, {"*": "o..."}])
@pytest.mark.parametrize("given", [True, False], ids=["params", "init"])
def test_gradients_of_single_examples_are_refused(layouts: Any, given: bool) -> None:
    params = {"Dense_0": KERNELS["Dense_0"]}
    gc = gcx.optax.centralize(layouts)
    private = optax.contrib.differentially_private_aggregate(1.0, 0.5, key=0)
    grads = jax.vmap(jax.grad(loss_of_example), in_axes=(None, 0))(params, normal(40, 5, 4))
    wrong, right = optax.chain(gc, private, SGD), optax.chain(private, gc, SGD)
    message = r"Dense_0/\w+: the parameter has rank \d, and its gradient rank \d.*_aggregate"
    with pytest.raises(ValueError, match=message):
        wrong.update(grads, wrong.init(params), *[params] * given)
    (noisy, _), (updates, _) = (
        optimizer.update(grads, optimizer.init(params), *[params] * given)
        for optimizer in (private, right)
    )
    each = jax.vmap(lambda grad: gc.update(grad, optax.EmptyState())[0])(grads)
    axis = 1 if layouts == {"*": "o..."} else 0
    for found, tree, scale, axes in (
        (updates, noisy, -0.1, (axis,)),
        (each, grads, 1, (axis + 1,)),
    ):
        expected = scale * centralized(tree["Dense_0"]["kernel"], axes)
        np.testing.assert_allclose(found["Dense_0"]["kernel"], expected, atol=1e-15)


@pytest.mark.parametrize("given", [True, False], ids=["params", "init"])
def test_gradients_of_single_examples_are_refused_though_their_plan_is_known(given: bool) -> None:
    params, grads = {"kernel": normal(1, 4, 3)}, {"kernel": normal(1, 5, 4, 3)}
    gc, state = gcx.optax.centralize("flax"), optax.EmptyState()
    gc.update(grads, state, *[grads] * given)
    gc.init(params)
    gc.update(grads, state, grads)
    with pytest.raises(ValueError, match=r"kernel: the parameter has rank 2, .* rank 3"):
        gc.update(grads, state, *[params] * given)
