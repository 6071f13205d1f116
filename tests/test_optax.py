"""gcx.optax on plain parameter trees; test_optax_models has the packages that make such trees."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest

import gcx
from gcx import Layout

import canonical_order
from reference import centralized, fan_in_means
from same_bits import assert_same_bits

pytest.importorskip("jax")
pytest.importorskip("optax")

import jax
import jax.numpy as jnp
import optax
from jax import lax

import gcx.optax

from optax_training import FIRST_ONLY, KERNELS, SGD, Linear, Net, normal, normal_like, struct, train

pytestmark = pytest.mark.one_framework


def conv(x: Any, w: Any, spec: str, **options: Any) -> Any:
    rank = x.ndim - 2
    options = {"padding": "VALID", **options}
    numbers = ("NHWC", spec, "NHWC") if rank == 2 else ("NWC", spec, "NWC")
    return lax.conv_general_dilated(x, w, (1,) * rank, dimension_numbers=numbers, **options)


# --- whole models: which weights keep their means, and which move freely --------------------------


class WithList:
    """A node whose structure cannot be hashed."""

    def __init__(self, static: list[int], weight: Any) -> None:
        self.static, self.weight = static, weight


jax.tree_util.register_pytree_with_keys(
    WithList,
    lambda node: ([(jax.tree_util.GetAttrKey("weight"), node.weight)], node.static),
    lambda static, leaves: WithList(static, *leaves),
)


class Model(NamedTuple):
    preset: str
    params: Any
    apply: Any  # of params and 5 token numbers
    axes: dict[str, tuple[int, ...] | None]  # fan-in


TOKENS = jnp.array([0, 3, 1, 6, 3])


def flax_model(p: Any) -> Any:
    x = p["Embed_0/embedding"][TOKENS]
    heads = jnp.einsum("nd,dhk->nhk", x, p["attention/query/kernel"]) + p["attention/query/bias"]
    x = x + jnp.einsum("nhk,hkd->nd", jnp.tanh(heads), p["attention/out/kernel"])
    x = jnp.tanh(x * p["norm/scale"] + p["norm/bias"])
    return x @ p["Dense_0/kernel"] + p["Dense_0/bias"]


def haiku_model(p: Any) -> Any:
    x = conv(p["embed/embeddings"][TOKENS][None], p["conv1_d/w"], "WIO", padding="SAME")[0]
    x = x * p["batch_norm/scale"] + p["batch_norm/offset"]
    state = jnp.zeros((1, 3))
    for row in x[:2]:
        state = jnp.tanh(row @ p["gru/w_i"] + state @ p["gru/w_h"] + p["gru/b"])
    return state @ p["mlp/~/linear_0/w"] + p["mlp/~/linear_0/b"]


def equinox_model(p: Any) -> Any:
    convolution, linear = p.layers
    x = p.embedding.weight[TOKENS].reshape(1, 5, 4, 1) * p.norm.weight[..., None]
    x = conv(x, convolution.weight, "OIHW")
    x = jnp.tanh(x + convolution.bias.reshape(3))
    return x.reshape(1, 18) @ linear.weight.T


# Shape and fan-in axes of each parameter, None where it is to be left alone.
FLAX = {
    "Dense_0/bias": ((1,), None),
    "Dense_0/kernel": ((4, 1), (0,)),
    "Embed_0/embedding": ((7, 4), None),
    "attention/out/kernel": ((2, 3, 4), (0, 1)),
    "attention/query/bias": ((2, 3), None),
    "attention/query/kernel": ((4, 2, 3), (0,)),
    "norm/bias": ((4,), None),
    "norm/scale": ((4,), None),
}
HAIKU = {
    "batch_norm/offset": ((1, 4), None),
    "batch_norm/scale": ((1, 4), None),
    "conv1_d/w": ((3, 2, 4), (0, 1)),
    "embed/embeddings": ((7, 2), None),
    "gru/b": ((3,), None),
    "gru/w_h": ((3, 3), (0,)),
    "gru/w_i": ((4, 3), (0,)),
    "mlp/~/linear_0/b": ((1,), None),
    "mlp/~/linear_0/w": ((3, 1), (0,)),
}


def from_table(preset: str, apply: Any, table: dict[str, tuple[Any, Any]]) -> Model:
    params = {path: normal(k, *shape) for k, (path, (shape, _)) in enumerate(table.items())}
    return Model(preset, params, apply, {path: axes for path, (_, axes) in table.items()})


MODELS = {
    "flax": from_table("flax", flax_model, FLAX),
    "haiku": from_table("haiku", haiku_model, HAIKU),
    "equinox": Model(
        "equinox",
        Net(
            embedding=Linear(normal(1, 7, 4), None),
            norm=Linear(normal(2, 5, 4), None),
            layers=[
                Linear(normal(3, 3, 1, 3, 3), normal(4, 3, 1, 1)),
                Linear(normal(5, 1, 18), None),
            ],
        ),
        equinox_model,
        {
            "embedding/weight": None,
            "embedding/bias": None,
            "norm/weight": None,
            "norm/bias": None,
            "layers/0/weight": (1, 2, 3),
            "layers/0/bias": None,
            "layers/1/weight": (1,),
            "layers/1/bias": None,
        },
    ),
}

KEEP_THE_MEANS = {
    "gradient": lambda c: optax.chain(
        optax.clip_by_global_norm(5.0), c, optax.sgd(0.02, momentum=0.9, nesterov=True)
    ),
    "gradient with decay": lambda c: optax.chain(
        optax.add_decayed_weights(0.1), c, optax.sgd(0.02, momentum=0.9)
    ),
    "update": lambda c: optax.chain(optax.adamw(0.02, weight_decay=0.1), c),
}


def leaves_of(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)


@pytest.mark.parametrize("make", KEEP_THE_MEANS.values(), ids=KEEP_THE_MEANS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_training_keeps_the_fan_in_means(model: Model, make: Any) -> None:
    def loss(params: Any) -> Any:
        return jnp.sum((model.apply(params) - 1.0) ** 2)

    rows = gcx.optax.plan(model.params, model.preset)
    assert [row.name for row in rows] == list(model.axes)
    end = train(make(gcx.optax.centralize(model.preset)), loss, model.params, steps=20)
    for row, before, after in zip(rows, leaves_of(model.params), leaves_of(end), strict=True):
        axes = model.axes[row.name]
        if before is None:
            assert after is None
            continue
        assert np.abs(after - before).max() > 1e-4, row.name
        assert (row.layout is None) == (axes is None), row.name
        if axes is not None:
            drift = fan_in_means(after - before, axes)
            np.testing.assert_allclose(drift, 0, atol=1e-13, err_msg=row.name)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_updates_are_those_of_the_reference(model: Model) -> None:
    grads = normal_like(50, model.params)
    optimizer = gcx.optax.centralize(model.preset)
    updates, _ = optimizer.update(grads, optimizer.init(model.params))
    for axes, grad, update in zip(
        model.axes.values(), leaves_of(grads), leaves_of(updates), strict=True
    ):
        if axes is None:
            assert update is grad
        else:
            np.testing.assert_allclose(update, centralized(grad, axes), atol=1e-15)


# --- trajectories against NumPy -------------------------------------------------------------------

LEARNING_RATE, DECAY = 0.05, 0.1
X, Y = np.asarray(normal(20, 6, 4)), np.asarray(normal(21, 6, 2))
START = {
    "Dense_0": {"kernel": np.asarray(normal(22, 4, 3)), "bias": np.zeros(3)},
    "Dense_1": {"kernel": np.asarray(normal(23, 3, 2)), "bias": np.zeros(2)},
}


def two_layers(params: Any) -> Any:
    first, second = params["Dense_0"], params["Dense_1"]
    hidden = jnp.tanh(X @ first["kernel"] + first["bias"])
    return jnp.sum((hidden @ second["kernel"] + second["bias"] - Y) ** 2) / 2


def backpropagated(params: Any) -> Any:
    """Gradient of `two_layers`, by hand."""
    first, second = params["Dense_0"], params["Dense_1"]
    hidden = np.tanh(X @ first["kernel"] + first["bias"])
    error = hidden @ second["kernel"] + second["bias"] - Y
    before = (error @ second["kernel"].T) * (1 - hidden**2)
    return {
        "Dense_0": {"kernel": X.T @ before, "bias": before.sum(0)},
        "Dense_1": {"kernel": hidden.T @ error, "bias": error.sum(0)},
    }


def project(array: Any) -> Any:
    return centralized(array, (0,)) if array.ndim == 2 else array


def adam_direction(t: int, g: Any, m: Any, v: Any) -> Any:
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    return m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8), m, v


def after(change: Any, direction: Any, m: Any, v: Any) -> Any:
    return change(direction), m, v


def with_momentum(g: Any, m: Any, v: Any) -> Any:
    return 0.9 * m + g, 0.9 * m + g, v


# The step before the learning rate with the new moments, as NumPy has it and as optax makes it.
TRAJECTORIES: dict[str, tuple[Any, Any]] = {
    "sgd": (
        lambda t, w, g, m, v: (project(g), m, v),
        lambda c: optax.chain(c, optax.sgd(LEARNING_RATE)),
    ),
    "sgd of the paper": (
        lambda t, w, g, m, v: with_momentum(project(g + DECAY * w), m, v),
        lambda c: optax.chain(
            optax.add_decayed_weights(DECAY), c, optax.sgd(LEARNING_RATE, momentum=0.9)
        ),
    ),
    "adam, gradient": (
        lambda t, w, g, m, v: adam_direction(t, project(g), m, v),
        lambda c: optax.chain(c, optax.adam(LEARNING_RATE)),
    ),
    "adamw, update": (
        lambda t, w, g, m, v: after(lambda d: project(d + DECAY * w), *adam_direction(t, g, m, v)),
        lambda c: optax.chain(optax.adamw(LEARNING_RATE, weight_decay=DECAY), c),
    ),
    "adamw, update, decay outside": (
        lambda t, w, g, m, v: after(lambda d: project(d) + DECAY * w, *adam_direction(t, g, m, v)),
        lambda c: optax.chain(
            optax.scale_by_adam(),
            c,
            optax.add_decayed_weights(DECAY),
            optax.scale_by_learning_rate(LEARNING_RATE),
        ),
    ),
}


@pytest.mark.parametrize(("step", "make"), TRAJECTORIES.values(), ids=TRAJECTORIES)
def test_trajectory_is_that_of_numpy(step: Any, make: Any) -> None:
    expected: Any = START
    m = v = jax.tree.map(np.zeros_like, START)
    for t in range(1, 16):
        steps = jax.tree.map(partial(step, t), expected, backpropagated(expected), m, v)
        change, m, v = jax.tree.transpose(
            jax.tree.structure(START), jax.tree.structure((0, 0, 0)), steps
        )
        expected = jax.tree.map(lambda w, d: w - LEARNING_RATE * d, expected, change)
    found = train(make(gcx.optax.centralize("flax")), two_layers, START, steps=15)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12), found, expected)


# --- the transformation of optax itself, as a documented fact -------------------------------------


def drift(optimizer: Any) -> float:
    end = train(optimizer, two_layers, START)
    change = end["Dense_0"]["kernel"] - START["Dense_0"]["kernel"]
    return float(np.abs(fan_in_means(change, (0,))).max())


def test_optax_centralize_averages_over_other_axes() -> None:
    def then_sgd(c: Any) -> Any:
        return optax.chain(c, optax.sgd(LEARNING_RATE))

    assert drift(then_sgd(gcx.optax.centralize("flax"))) < 1e-14
    assert drift(then_sgd(optax.centralize())) > 1e-2


def test_optax_centralize_freezes_a_single_output() -> None:
    def loss(params: Any) -> Any:
        return jnp.mean((X @ params["kernel"] - Y[:, :1]) ** 2)

    start = {"kernel": normal(3, 4, 1)}
    theirs = train(optax.chain(optax.centralize(), optax.sgd(0.1)), loss, start)
    ours = train(optax.chain(gcx.optax.centralize("flax"), optax.sgd(0.1)), loss, start)
    np.testing.assert_array_equal(theirs["kernel"], start["kernel"])
    assert loss(ours) < loss(start)


# --- inside the other transformations -------------------------------------------------------------

LABELS = jax.tree.map(lambda first: "gc" if first else "plain", FIRST_ONLY)

# What wraps the transformation, and the kernels that it centralizes.
WRAPPERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "chain": (lambda c: optax.chain(c, SGD), ("Dense_0", "Dense_1")),
    "masked": (lambda c: optax.chain(optax.masked(c, FIRST_ONLY), SGD), ("Dense_0",)),
    "multi_transform": (
        lambda c: optax.multi_transform({"gc": optax.chain(c, SGD), "plain": SGD}, LABELS),
        ("Dense_0",),
    ),
    "inject_hyperparams": (
        lambda c: optax.inject_hyperparams(lambda lr: optax.chain(c, optax.sgd(lr)))(lr=0.1),
        ("Dense_0", "Dense_1"),
    ),
    "MultiSteps": (
        lambda c: optax.MultiSteps(optax.chain(c, SGD), every_k_schedule=1),
        ("Dense_0", "Dense_1"),
    ),
    "apply_if_finite": (
        lambda c: optax.apply_if_finite(optax.chain(c, SGD), 3),
        ("Dense_0", "Dense_1"),
    ),
}
SAME_BY_PATH: dict[str, Any] = {
    "preset": "flax",
    "mapping": {"Dense_0/kernel": "...o", "Dense_1/kernel": Layout("...o"), "*": None},
    "function": lambda path, array: "...o" if path.endswith("kernel") else None,
}


@pytest.mark.parametrize("layouts", SAME_BY_PATH.values(), ids=SAME_BY_PATH)
@pytest.mark.parametrize(("wrap", "names"), WRAPPERS.values(), ids=WRAPPERS)
def test_works_inside(wrap: Any, names: tuple[str, ...], layouts: Any) -> None:
    optimizer = wrap(gcx.optax.centralize(layouts))
    grads = normal_like(30, KERNELS)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(KERNELS), KERNELS)
    for name, layer in grads.items():
        kernel = layer["kernel"]
        expected = centralized(kernel, (0,)) if name in names else kernel
        np.testing.assert_allclose(updates[name]["kernel"], -0.1 * expected, atol=1e-15)
        np.testing.assert_allclose(updates[name]["bias"], -0.1 * layer["bias"], atol=1e-15)


def means_stay(end: Any) -> None:
    """Corollary 4.1 for the kernels of `two_layers`, which have moved."""
    for name, layer in START.items():
        change = np.asarray(end[name]["kernel"]) - layer["kernel"]
        assert np.abs(change).max() > 1e-3
        np.testing.assert_allclose(fan_in_means(change, (0,)), 0, atol=1e-13)


KEPT_BY: dict[str, Any] = {
    "ema": lambda c: optax.chain(c, optax.ema(0.9), optax.sgd(LEARNING_RATE)),
    "contrib.muon": lambda c: optax.chain(c, optax.contrib.muon(LEARNING_RATE)),
    "contrib.schedule_free": lambda c: optax.contrib.schedule_free(
        optax.chain(c, optax.sgd(LEARNING_RATE)), LEARNING_RATE
    ),
    "MultiSteps": lambda c: optax.MultiSteps(optax.chain(c, optax.sgd(LEARNING_RATE)), 2),
}


@pytest.mark.parametrize("make", KEPT_BY.values(), ids=KEPT_BY)
def test_optimizers_that_keep_the_means(make: Any) -> None:
    means_stay(train(make(gcx.optax.centralize("flax")), two_layers, START, steps=12))


def test_lbfgs_searches_along_centralized_directions() -> None:
    optimizer = optax.chain(gcx.optax.centralize("flax"), optax.lbfgs())
    value_and_grad = jax.jit(optax.value_and_grad_from_state(two_layers))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=two_layers
        )
        return optax.apply_updates(params, updates), state

    params, state = START, optimizer.init(START)
    for _ in range(5):
        params, state = step(params, state)
    assert two_layers(params) < two_layers(START)
    means_stay(params)


# --- inside the transformations of JAX ------------------------------------------------------------

PAPER = optax.chain(gcx.optax.centralize("flax"), optax.sgd(LEARNING_RATE, momentum=0.9))


def step_of_paper(params: Any, state: Any) -> Any:
    updates, state = PAPER.update(jax.grad(two_layers)(params), state, params)
    return optax.apply_updates(params, updates), state


def test_steps_in_scan_and_with_donated_buffers_are_the_same() -> None:
    expected = train(PAPER, two_layers, START, steps=6)
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


def test_replicas_in_pmap() -> None:
    replicated = jax.tree.map(lambda a: jnp.asarray(a)[None], START)
    found, _ = jax.pmap(step_of_paper)(replicated, jax.pmap(PAPER.init)(replicated))
    expected, _ = step_of_paper(START, PAPER.init(START))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-12), found, expected)


def test_inject_hyperparams_of_the_transformation_itself() -> None:
    inject = optax.inject_hyperparams(gcx.optax.centralize, static_args=("layouts", "strength"))
    optimizer = inject("flax", strength=0.5)
    grads = {"kernel": jnp.array([[1.0], [3.0]])}
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    assert updates["kernel"].tolist() == [[0.0], [2.0]]
    dynamic = optax.inject_hyperparams(gcx.optax.centralize)("flax", strength=0.5)
    with pytest.raises(TypeError, match=r"strength is .* a Python number .*static_args="):
        dynamic.init(grads)


def test_centralizes_the_mean_of_accumulated_gradients() -> None:
    def second_update(optimizer: Any) -> Any:
        steps = optax.MultiSteps(optimizer, every_k_schedule=2)
        _, state = steps.update(normal_like(30, KERNELS), steps.init(KERNELS), KERNELS)
        return steps.update(normal_like(60, KERNELS), state, KERNELS)[0]["Dense_0"]["kernel"]

    found = second_update(optax.chain(gcx.optax.centralize("flax"), SGD))
    np.testing.assert_allclose(found, centralized(second_update(SGD), (0,)), atol=1e-15)


def gradients_of_examples(params: Any) -> Any:
    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(jnp.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]))

    return jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, normal(40, 5, 4))


@pytest.mark.parametrize("layouts", ["flax", {"*kernel": "io", "*": None}, {"*": "o..."}])
@pytest.mark.parametrize("given", [True, False], ids=["params", "init"])
def test_gradients_of_single_examples_are_refused(layouts: Any, given: bool) -> None:
    params = {"Dense_0": KERNELS["Dense_0"]}
    gc = gcx.optax.centralize(layouts)
    private = optax.contrib.differentially_private_aggregate(1.0, 0.5, key=0)
    grads = gradients_of_examples(params)
    wrong = optax.chain(gc, private, SGD)
    message = r"Dense_0/\w+: the parameter has rank \d, and its gradient rank \d.*_aggregate"
    with pytest.raises(ValueError, match=message):
        wrong.update(grads, wrong.init(params), *[params] * given)
    right = optax.chain(private, gc, SGD)
    (noisy, _), (updates, _) = (
        optimizer.update(grads, optimizer.init(params), *[params] * given)
        for optimizer in (private, right)
    )
    axes = (1,) if layouts == {"*": "o..."} else (0,)
    expected = -0.1 * centralized(np.asarray(noisy["Dense_0"]["kernel"]), axes)
    np.testing.assert_allclose(updates["Dense_0"]["kernel"], expected, atol=1e-15)


def test_gradients_of_single_examples_under_vmap() -> None:
    grads = normal_like(40, {"kernel": normal(1, 5, 4, 3)})
    gc = gcx.optax.centralize("flax")
    state = gc.init({"kernel": normal(1, 4, 3)})
    updates = jax.vmap(lambda g: gc.update(g, state)[0])(grads)
    np.testing.assert_allclose(updates["kernel"], centralized(grads["kernel"], (1,)), atol=1e-15)


# Equal bits


def many_inputs() -> Any:
    """Kernels with so many inputs that orders of summation differ in bits."""
    rng = np.random.default_rng(0)
    return {
        "Dense_0": {"kernel": 0.3 + rng.normal(size=(1000, 5)), "bias": rng.normal(size=5)},
        "Conv_0": {"kernel": 0.3 + rng.normal(size=(3, 3, 40, 7))},
    }


REPRODUCIBLE = gcx.optax.centralize("flax", reproducible=True)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_reproducible_bits(run: Any, dtype: str) -> None:
    grads = jax.tree.map(lambda x: jnp.asarray(x, dtype), many_inputs())
    updates, _ = run(REPRODUCIBLE.update)(grads, REPRODUCIBLE.init(grads))
    for name, axes in {"Dense_0": (0,), "Conv_0": (0, 1, 2)}.items():
        grad, found = (np.asarray(tree[name]["kernel"]) for tree in (grads, updates))
        wide = canonical_order.working_dtype(dtype)
        expected = canonical_order.centralized(grad.astype(wide), axes, dtype)
        assert_same_bits(found.astype(wide), expected)


def test_reproducible_in_a_chain() -> None:
    """What is done to the updates before and after XLA may round as it likes, but not this."""
    grads = jax.tree.map(lambda x: jnp.asarray(x, "float32"), many_inputs())
    optimizer = optax.chain(optax.sgd(2**-4), REPRODUCIBLE)  # which scales exactly
    init = optimizer.init(grads)
    eager, _ = optimizer.update(grads, init, grads)
    jitted, _ = jax.jit(optimizer.update)(grads, init, grads)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)


def test_reproducible_takes_shapes() -> None:
    shapes = jax.tree.map(lambda x: struct(*x.shape, dtype="float16"), many_inputs())
    assert REPRODUCIBLE.init(shapes) == optax.EmptyState()
    assert jax.eval_shape(REPRODUCIBLE.init, shapes) == optax.EmptyState()


@pytest.mark.parametrize("make", [struct, lambda *shape, dtype: jnp.ones(shape, dtype)])
def test_reproducible_is_refused_for_other_dtypes(make: Any) -> None:
    params = {"Dense_0": {"kernel": make(3, 2, dtype="complex64"), "bias": make(2, dtype="int32")}}
    with pytest.raises(TypeError, match=r"Dense_0/kernel: reproducible=True is for .*complex64"):
        REPRODUCIBLE.init(params)


def test_reproducible_is_refused_for_a_fan_in_that_is_split() -> None:
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


def test_has_no_state() -> None:
    optimizer = gcx.optax.centralize("flax")
    state = optimizer.init(KERNELS)
    _, after = optimizer.update(KERNELS, state)
    assert state == after == optax.EmptyState()


def test_init_takes_shapes() -> None:
    optimizer = gcx.optax.centralize("flax")
    assert jax.eval_shape(optimizer.init, {"kernel": struct(3, 2)}) == optax.EmptyState()


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
    for grads in [*trees, *trees]:
        updates, _ = update(grads, optax.EmptyState())
        for name, grad in grads.items():
            expected = centralized(grad, tuple(range(1, grad.ndim)))
            np.testing.assert_allclose(updates[name], expected, atol=1e-6)
    assert seen == ["a", "a", "a", "b", "a"]


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_layout_may_split_an_axis(reproducible: bool) -> None:
    layouts = {"weight": Layout("(bi)o...", b=2)}
    optimizer = gcx.optax.centralize(layouts, reproducible=reproducible)
    grads = {"weight": normal(1, 8, 3, 2).astype("float32")}
    updates, _ = optimizer.update(grads, optimizer.init(grads))
    groups = centralized(np.reshape(grads["weight"], (2, 4, 3, 2)), (1, 3))
    np.testing.assert_allclose(updates["weight"], groups.reshape(8, 3, 2), atol=1e-6)


def test_a_layout_that_splits_an_axis_is_not_for_shards() -> None:
    layouts = {"weight": Layout("(bi)o...", b=2)}
    grads = {"weight": normal(1, 8, 3)}
    update = gcx.optax.centralize(layouts, axis_name="d").update
    with pytest.raises(ValueError, match=r"^weight: Layout\(.* splits an axis of the whole weight"):
        jax.vmap(lambda g: update(g, optax.EmptyState())[0], axis_name="d")(
            {"weight": grads["weight"][None]}
        )


def test_many_forms_of_gradients() -> None:
    update = gcx.optax.centralize({"*": "o..."}).update
    for size in [*range(2, 14)] * 2:
        grads = [normal(size, 2, size)]
        (updated,), _ = update(grads, optax.EmptyState())
        np.testing.assert_allclose(updated, centralized(grads[0], (1,)), atol=1e-15)


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
    optimizer = gcx.optax.centralize("flax")
    state = optimizer.init(params)

    def loss(p: Any) -> Any:
        return jnp.sum(p["kernel"][p["seen"]] ** 2)

    grads = jax.grad(loss, allow_int=True)(params)
    assert grads["seen"].dtype == jax.dtypes.float0
    updates, _ = optimizer.update(grads, state, params)
    assert updates["seen"] is grads["seen"]
    assert updates["table"] is None
    expected = centralized(grads["kernel"], (0,))
    np.testing.assert_allclose(updates["kernel"], expected, atol=1e-15)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "complex64"])
def test_dtype_stays(dtype: str) -> None:
    grads = {"kernel": jnp.array([[1.0, 2.0], [3.0, 8.0]], dtype)}
    optimizer = gcx.optax.centralize("flax")
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(grads))
    assert updates["kernel"].dtype == dtype
    assert updates["kernel"].tolist() == [[-1.0, -3.0], [1.0, 3.0]]
