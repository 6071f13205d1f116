"""The optimizers: the formulas, the state, the errors."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from gcx._dispatch import backend_for
from gcx._names import flatten, rebuild
from gcx.optim import SGD, Adam, AdamW

import canonical_order
import libraries
import reference

LAYOUTS = {"conv": "o...", "*kernel": "...o", "*": None}
FAN_INS = {"conv": (1, 2, 3), "dense/kernel": (0,)}  # what LAYOUTS says, in axes

OPTIMIZERS = {
    "sgd": SGD(0.05),
    "sgd-decay": SGD(0.05, weight_decay=0.1),
    "momentum": SGD(0.05, momentum=0.9),
    "momentum-decay": SGD(0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": SGD(0.05, momentum=0.9, nesterov=True),
    "nesterov-decay": SGD(0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": Adam(),
    "adam-decay": Adam(0.05, weight_decay=0.1),
    "adam-betas": Adam(0.05, betas=(0.5, 0.6), eps=1e-3),
    "adamw": AdamW(),
    "adamw-decay": AdamW(0.05, weight_decay=0.1),
    "adamw-no-decay": AdamW(0.05, weight_decay=0.0),
}

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
one_of_each = pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
Tree = dict[str, Any]


@cache
def expected(name: str, place: str | None, steps: int) -> Tree:
    """Where `trained` must arrive, by the algorithms for one array of NumPy."""
    start, *grads = problem(steps)

    def end_of(key: str) -> Any:
        axes = FAN_INS.get(key) if place else None
        w, own, o = leaves(start)[key], [leaves(tree)[key] for tree in grads], OPTIMIZERS[name]
        if isinstance(o, Adam):
            return adam_of_the_authors(w, own, axes, o, gc_loc=place != "update")
        options = {"weight_decay": o.weight_decay, "momentum": o.momentum, "nesterov": o.nesterov}
        return canonical_order.sgd(w, own, axes, o.lr, where=place or "gradient", **options)

    return {key: end_of(key) for key in leaves(start)}


def adam_of_the_authors(w: Any, grads: list[Any], axes: Any, o: Adam, *, gc_loc: bool) -> Any:
    """As in Yonghongwei/Gradient-Centralization, algorithm-GC, with the decay of torch's AdamW."""

    def p(x: Any) -> Any:
        return reference.centralized(x, axes) if axes else x

    is_decoupled = isinstance(o, AdamW)
    exp_avg, exp_avg_sq = np.zeros_like(w), np.zeros_like(w)
    for t, raw in enumerate(grads, start=1):
        grad = raw if is_decoupled else raw + o.weight_decay * w
        grad = p(grad) if gc_loc else grad
        exp_avg = o.betas[0] * exp_avg + (1 - o.betas[0]) * grad
        exp_avg_sq = o.betas[1] * exp_avg_sq + (1 - o.betas[1]) * grad * grad
        denom = np.sqrt(exp_avg_sq) / math.sqrt(1 - o.betas[1] ** t) + o.eps
        change = o.lr / (1 - o.betas[0] ** t) * (exp_avg / denom)
        if is_decoupled:
            change = change + o.lr * o.weight_decay * w
        w = w - (change if gc_loc else p(change))
    return w


@cache
def problem(steps: int) -> list[Tree]:
    """Weights, then a gradient for each step."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return np.asarray(rng.normal(0.3, 1.0, shape))

    return [
        {
            "conv": draw(4, 3, 2, 2),
            "dense": {"kernel": draw(5, 3), "bias": draw(3)},
            "scale": draw(),
        }
        for _ in range(1 + steps)
    ]


def leaves(tree: Tree) -> Tree:
    return dict(flatten(tree))


def arrays(xp: libraries.ArrayLibrary, tree: Tree, dtype: str = "float64") -> Tree:
    return rebuild(tree, [xp.asarray(leaf, dtype) for leaf in leaves(tree).values()])


def trained(
    xp: libraries.ArrayLibrary, optimizer: Any, steps: int, dtype: str = "float64"
) -> tuple[Tree, Tree]:
    start, *grads = [arrays(xp, tree, dtype) for tree in problem(steps)]
    params, state = start, optimizer.init(start)
    for tree in grads:
        params, state = optimizer.update(params, tree, state)
    return params, state


def assert_close(xp: libraries.ArrayLibrary, actual: Tree, desired: Tree, rtol: float) -> None:
    """Equal up to rounding: `rtol` of the largest element of each array."""
    assert leaves(actual).keys() == leaves(desired).keys()
    for key, want in leaves(desired).items():
        atol = rtol * np.max(np.abs(want))
        found = xp.numpy(leaves(actual)[key])
        np.testing.assert_allclose(found, want, rtol=0, atol=atol, err_msg=key)


@pytest.mark.parametrize("place", [None, "gradient", "update"])
@every_optimizer
def test_it_is_the_known_optimizer_or_the_algorithm_of_the_authors(
    xp: Any, name: str, place: Any
) -> None:
    layouts = LAYOUTS if place else {"ignored": "o..."}
    optimizer = replace(OPTIMIZERS[name], where=place, layouts=layouts)
    few = 3 if xp.name == "dask" else 100  # the graph of dask grows until somebody reads it
    for dtype, rtol, many in (("float64", 1e-13, 30 if place else 100), ("float32", 4e-6, 10)):
        steps = min(few, many)
        params, _ = trained(xp, optimizer, steps, dtype)
        assert_close(xp, params, expected(name, place, steps), rtol)


@every_optimizer
def test_without_centralization_it_is_torch_optim(name: str) -> None:
    torch = pytest.importorskip("torch")
    (xp,) = [lib for lib in libraries.MAKERS["torch"]() if lib.device == "cpu"]
    optimizer = OPTIMIZERS[name]
    start, *grads = [arrays(xp, tree) for tree in problem(100)]
    weights = {key: torch.nn.Parameter(leaf) for key, leaf in leaves(start).items()}
    options = {
        option: value
        for option, value in vars(optimizer).items()
        if option not in ("where", "layouts", "strength", "reproducible")
    }
    theirs = getattr(torch.optim, type(optimizer).__name__)(weights.values(), **options)
    for tree in grads:
        for key, leaf in leaves(tree).items():
            weights[key].grad = leaf
        theirs.step()
    ours, _ = trained(xp, replace(optimizer, where=None), 100)
    assert_close(xp, ours, {key: xp.numpy(leaf) for key, leaf in weights.items()}, rtol=1e-13)


def test_complex_weights_divide_by_the_modulus(xp: Any) -> None:
    grad = np.array([[3 + 4j, 6 - 8j, 0 + 1j]])
    params = [xp.asarray(np.zeros((1, 3)), "complex128")]
    optimizer = Adam(1.0, eps=0.0, where=None)
    grads = [xp.asarray(grad, "complex128")]
    (new,), _ = optimizer.update(params, grads, optimizer.init(params))
    np.testing.assert_allclose(xp.numpy(new), -grad / np.abs(grad), rtol=1e-12)


@pytest.mark.parametrize("layouts", ["...o", ["...o", None, None]], ids=["one", "each"])
def test_parameters_may_be_a_list(xp: Any, layouts: Any) -> None:
    optimizer, wants = SGD(1.0, layouts=layouts), np.repeat([[3], [1], [-1], [-3]], 2, axis=1)
    for dtype in ("float64", *xp.narrow_dtypes[:2]):
        params = [xp.asarray(np.zeros(shape), dtype) for shape in ((4, 2), 2, ())]
        numbers = np.arange(8.0).reshape(4, 2), np.ones(2), 1.0
        grads = [xp.asarray(grad, dtype) for grad in numbers]
        new, state = optimizer.update(params, grads, optimizer.init(params))
        for found, want in zip(new, [wants, [-1, -1], -1], strict=True):
            np.testing.assert_array_equal(xp.numpy(found), want)
        assert state == {"step": [1, 1, 1]}


@one_of_each
def test_no_gradient_leaves_parameter_and_state(xp: Any, name: str) -> None:
    optimizer = replace(OPTIMIZERS[name], layouts=LAYOUTS)
    start, first, second = [arrays(xp, tree) for tree in problem(2)]
    held = {**first, "conv": None}
    params, state = optimizer.update(start, held, optimizer.init(start))
    assert params["conv"] is start["conv"]
    assert state["step"] == {"conv": 0, "dense": {"kernel": 1, "bias": 1}, "scale": 1}

    # Its own first step comes when its first gradient does.
    params, state = optimizer.update(params, second, state)
    alone = {"conv": start["conv"]}
    only_conv = replace(optimizer, layouts="o...")
    want, _ = only_conv.update(alone, {"conv": second["conv"]}, only_conv.init(alone))
    np.testing.assert_array_equal(xp.numpy(params["conv"]), xp.numpy(want["conv"]))


@one_of_each
def test_nothing_is_modified(xp: Any, name: str) -> None:
    optimizer = replace(OPTIMIZERS[name], layouts=LAYOUTS)
    params, state = trained(xp, optimizer, 1)
    grads = arrays(xp, problem(2)[2])
    given = leaves({"params": params, "grads": grads, "state": state})
    before = {key: x if isinstance(x, int) else xp.numpy(x) for key, x in given.items()}
    optimizer.update(params, grads, state)
    for key, x in given.items():
        after = x if isinstance(x, int) else xp.numpy(x)
        np.testing.assert_array_equal(after, before[key], err_msg=key)


@one_of_each
def test_arrays_keep_library_dtype_and_shape(xp: Any, name: str) -> None:
    """NumPy numbers as hyperparameters do not widen the steps."""
    numbers: Tree = {"lr": np.float64(0.125), "weight_decay": np.float32(0.125)}
    numbers |= {"betas": (np.float32(0.875), np.float64(0.875))} if "adam" in name else {}
    plain = rebuild(numbers, map(float, leaves(numbers).values()))
    optimizer = replace(OPTIMIZERS[name], layouts=LAYOUTS, **plain)
    for dtype in ("float32", *xp.narrow_dtypes[:2]):
        params, state = trained(xp, replace(optimizer, **numbers), 2, dtype)
        expected, _ = trained(xp, optimizer, 2, dtype)
        assert list(params) == list(expected)
        for tree in (params, *[state[key] for key in state if key != "step"]):
            for key, want in leaves(arrays(xp, problem(0)[0], dtype)).items():
                found = leaves(tree)[key]
                assert (found.dtype, found.shape) == (want.dtype, want.shape)
                assert backend_for(found) is backend_for(want)
        expected = rebuild(expected, map(xp.numpy, leaves(expected).values()))
        assert_close(xp, params, expected, rtol=0)


@one_of_each
def test_training_goes_on_from_a_state_saved_as_arrays(name: str) -> None:
    xp = libraries.MAKERS["numpy"]()[0]
    optimizer = replace(OPTIMIZERS[name], layouts=LAYOUTS)
    params, state = trained(xp, optimizer, 1, "float32")
    second = arrays(xp, problem(2)[2], "float32")
    loaded = rebuild(state, [np.asarray(leaf) for leaf in leaves(state).values()])
    want, _ = optimizer.update(params, second, state)
    found, new_state = optimizer.update(params, second, loaded)
    assert_close(xp, found, want, rtol=1e-6)
    assert {leaf.dtype for leaf in leaves(found).values()} == {np.dtype("float32")}
    assert {int(step) for step in leaves(new_state["step"]).values()} == {2}


def test_keys_may_come_in_another_order() -> None:
    params = {"a": np.zeros((1, 2)), "b": np.zeros(2)}
    optimizer = SGD(1.0, momentum=0.9)
    grads = {"b": np.ones(2), "a": np.array([[1.0, 3.0]])}
    state = optimizer.init({"b": params["b"], "a": params["a"]})
    new, _ = optimizer.update(params, grads, state)
    np.testing.assert_array_equal(new["a"], [[1, -1]])
    assert list(new) == ["a", "b"]


@one_of_each
def test_a_step_compiles_once(name: str) -> None:
    jax = pytest.importorskip("jax")
    xp = libraries.MAKERS["jax"]()[0]
    optimizer = replace(OPTIMIZERS[name], layouts=LAYOUTS)
    traced = []

    @jax.jit
    def step(params: Any, grads: Any, state: Any) -> Any:
        traced.append(1)
        return optimizer.update(params, grads, state)

    for dtype, rtol in (("float64", 1e-13), ("float32", 1e-5)):
        params, *grads = [arrays(xp, tree, dtype) for tree in problem(5)]
        state = optimizer.init(params)
        for tree in grads:
            params, state = step(params, tree, state)
        assert params["conv"].dtype == dtype
        want, _ = trained(xp, optimizer, 5)
        assert_close(xp, params, rebuild(want, map(xp.numpy, leaves(want).values())), rtol)
    assert len(traced) == 2  # once a dtype


def test_a_value_shows_its_hyperparameters_and_never_changes() -> None:
    for kind in (SGD, Adam, AdamW):
        with pytest.raises(TypeError, match="positional"):  # the learning rate alone is
            kind(0.5, 0.9)  # type: ignore[misc]
        with pytest.raises(FrozenInstanceError):
            kind(0.5).lr = 1.0  # type: ignore[misc]
    shown = "lr=1.0, weight_decay=0.0, where='gradient', layouts='o...', strength=1.0, "
    shown += "reproducible=False, momentum=0.5, nesterov=False"
    assert repr(SGD(1, momentum=np.float32(0.5))) == f"SGD({shown})"
    for kind, decay in ((Adam, 0.0), (AdamW, 0.01)):  # the defaults of torch
        optimizer = kind()
        assert (optimizer.lr, optimizer.weight_decay, optimizer.eps) == (1e-3, decay, 1e-8)
        assert optimizer.betas == (0.9, 0.999)
