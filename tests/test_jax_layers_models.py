"""gcx.optax.layouts on whole models of Flax, Equinox and Haiku, which are trained."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import gcx.optax
from gcx import Layout
from gcx.plan import LeaveAlone

from jax_models import IMAGES, KEY, OfEquinox, OfLinen, OfNnx, axes_of, plan_of, said
from reference import centralized, fan_in_means

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

# The number of parameters, the path to a weight, with {} for its name, and the names of those with
# a fan-in, by its axes; others are left alone.
MODELS: dict[Callable[[], Any], tuple[int, str, dict[tuple[int, ...], str]]] = {
    OfNnx: (
        17,
        "{}/kernel",
        {
            (0,): "adapted adapted/lora/lora_a adapted/lora/lora_b attention/key attention/query "
            "attention/value head",
            (0, 1): "attention/out",
            (0, 1, 2): "conv",
            (0, 1, 3): "up",
            (1,): "stack",
        },
    ),
    OfEquinox: (
        17,
        "layers/{}/weight",
        {(1,): "0 3/query_proj 3/key_proj 3/value_proj 3/output_proj", (1, 2, 3): "1 2", (2,): "6"},
    ),
}


# --- rules of the user ----------------------------------------------------------------------------


def test_layers_of_others_register_a_rule() -> None:
    class Experts(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.zeros((2, 3, 4)))
            self.gate = nnx.Param(jnp.zeros((3, 2)))
            self.bias_in = nnx.Param(jnp.zeros((2, 4)))

    class MoreExperts(Experts):
        pass

    assert axes_of(plan_of(Experts())) == dict.fromkeys(("bias_in", "gate", "w"))

    @gcx.optax.register_layer(Experts)
    def rule(layer: Experts) -> dict[str, Any]:
        return {"w": "oio", "gate": None, "bias_*": LeaveAlone("bias of an expert")}

    assert rule.__name__ == "rule"
    assert said(plan_of(MoreExperts())) == {
        "bias_in": "bias of an expert",
        "gate": "left alone by the rule of Experts",
        "w": "oio Experts",
    }
    gcx.optax.register_layer(Experts)(lambda _: {"w": 5})
    with pytest.raises(TypeError, match=r"^layers/w: a layout is a string .* not int"):
        gcx.optax.layouts(nnx.Dict(layers=Experts()))


BROUGHT = """
import equinox as eqx
class Brought(eqx.Module):
    w: object
RULE = {"w": "oi"}
"""
SCRIPT = """
import sys, gcx.optax
print(*sys.modules)
import brought, numpy
print(gcx.optax.plan(brought.Brought(numpy.ones((2, 3))))[0])
"""


def test_packages_bring_rules_and_no_framework_is_imported_before_its_model(tmp_path: Path) -> None:
    info = tmp_path / "brings-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brings\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gcx.optax.layers]\nbrought.Brought = brought:RULE\n")
    (tmp_path / "brought.py").write_text(BROUGHT)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    modules, row = subprocess.check_output(
        [sys.executable, "-c", SCRIPT], text=True, env={**os.environ, "PYTHONPATH": path}
    ).splitlines()
    assert "gcx.optax._models.equinox" in modules.split()
    assert {"flax", "equinox", "haiku"} & set(modules.split()) == set()
    assert row == "PlanRow(name='w', shape=(2, 3), layout=Layout('oi'), reason='Brought')"


# --- in the optimizer -----------------------------------------------------------------------------

RNGS = nnx.Rngs(0)


@pytest.mark.parametrize("make", MODELS)
def test_a_model_is_layouts_and_parameters(make: Callable[[], Any]) -> None:
    """As are its layouts, and the shapes of it."""
    count, path, names_by_axes = MODELS[make]
    expected = {
        name if "lora_" in name else path.format(name): axes
        for axes, names in names_by_axes.items()
        for name in names.split()
    }
    of_equinox = make is OfEquinox
    model, shapes = make(), (eqx.filter_eval_shape if of_equinox else nnx.eval_shape)(make)
    params = eqx.filter(model, eqx.is_array) if of_equinox else nnx.state(model, nnx.Param)
    plan = gcx.optax.plan(params, model)
    found = axes_of(plan)
    assert len(found) == count
    assert {name: axes for name, axes in found.items() if axes} == expected
    assert gcx.optax.layouts(shapes) == gcx.optax.layouts(model)
    assert gcx.optax.plan(params, gcx.optax.layouts(model)) == plan
    assert gcx.optax.plan(model) == gcx.optax.plan(shapes) == plan
    grads = jax.tree.map(lambda a: jax.random.normal(KEY, a.shape), params)
    results = []
    for layouts in (model, gcx.optax.layouts(model)):
        optimizer = gcx.optax.centralize(layouts)
        updates, _ = optimizer.update(grads, optimizer.init(params))
        results.append(updates)
    jax.tree.map(np.testing.assert_array_equal, *results)
    for (name, axes), leaf in zip(found.items(), jax.tree.leaves(results[0]), strict=True):
        if axes:
            np.testing.assert_allclose(fan_in_means(leaf, axes), 0, atol=1e-6, err_msg=name)
    with pytest.raises(TypeError, match="needs no example inputs: give the module alone"):
        gcx.optax.layouts(model, jnp.zeros((2, 3)))


IN_CONTAINERS: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "equinox": (
        {"actor": eqx.nn.Linear(4, 3, key=KEY), "more": [eqx.nn.Conv1d(2, 3, 4, key=KEY)]},
        lambda model: eqx.filter(model, eqx.is_inexact_array),
        {"actor/weight": "oi Linear", "more/0/weight": "o... Conv", "more/0/bias": "bias"},
    ),
    "nnx": (
        [{"actor": nnx.Linear(4, 3, rngs=RNGS)}, (nnx.Param(jnp.ones((2, 2))),)],
        lambda model: nnx.state(model, nnx.Param),
        {"0/actor/kernel": "io Linear", "1/0": "unknown: nobody declared list.1/0"},
    ),
    "nnx.List": (
        nnx.List([nnx.Linear(4, 3, rngs=RNGS), nnx.Param(jnp.ones((2, 2)))]),
        lambda model: nnx.state(model, nnx.Param),
        {"0/kernel": "io Linear", "1": "unknown: nobody declared List.1"},
    ),
}


@pytest.mark.parametrize(("model", "params", "expected"), IN_CONTAINERS.values(), ids=IN_CONTAINERS)
def test_models_in_containers(model: Any, params: Any, expected: dict[str, str]) -> None:
    plan = gcx.optax.plan(params(model), model)
    assert said(plan).items() >= expected.items()
    assert all("bias" in name for name in said(plan).keys() - expected.keys())
    updates, _ = gcx.optax.centralize(model).update(params(model), optax.EmptyState())
    leaves = jax.tree.leaves(params(model)), jax.tree.leaves(updates)
    for axes, before, after in zip(axes_of(plan).values(), *leaves, strict=True):
        expected_update = centralized(np.asarray(before), axes) if axes else before
        np.testing.assert_allclose(after, expected_update, atol=1e-6)


def test_part_of_a_model_may_be_trained() -> None:
    model = OfNnx()
    optimizer = nnx.Optimizer(
        model, optax.chain(gcx.optax.centralize(model), optax.sgd(0.1)), wrt=nnx.LoRAParam
    )
    assert jax.tree.leaves(optimizer.opt_state) is not None
    rows = gcx.optax.plan(nnx.state(model, nnx.LoRAParam), model)
    lora = [f"adapted/lora/lora_{half}" for half in "ab"]
    assert [row.name for row in rows if row.layout] == lora


def test_optimizer_of_nnx() -> None:
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    start = np.asarray(model.kernel[...])
    transformation = optax.chain(gcx.optax.centralize(model), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.mean((m(jnp.eye(4)) - 1.0) ** 2))(model)
    optimizer.update(model, grads)
    expected = start - 0.1 * centralized(np.asarray(grads["kernel"][...]), (0,))
    np.testing.assert_allclose(model.kernel[...], expected, atol=1e-15)
    assert not np.array_equal(expected, start)


def assert_means_kept(start: Any, end: Any, axes: tuple[int, ...]) -> None:
    change = np.asarray(end - start)
    assert np.abs(change).max() > 1e-3
    np.testing.assert_allclose(fan_in_means(change, axes), 0, atol=1e-7)


def test_train_state_of_flax() -> None:
    model, x = nn.Dense(1), jnp.eye(4)
    params = model.init(KEY, x)["params"]
    gc = gcx.optax.centralize(gcx.optax.layouts(model, x))
    chain = optax.chain(gc, optax.sgd(0.1, momentum=0.9))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=chain)

    @jax.jit
    def step(state: TrainState) -> TrainState:
        def loss(params: Any) -> Any:
            return jnp.mean((state.apply_fn({"params": params}, x) - 1.0) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(5):
        state = step(state)
    assert_means_kept(params["kernel"], state.params["kernel"], (0,))


def test_filtered_trees_of_equinox() -> None:
    # Functions are leaves of the model, and None in its gradient.
    model = eqx.nn.MLP(4, 1, 8, 2, key=KEY)
    optimizer = optax.chain(optax.adamw(0.01), gcx.optax.centralize(model))
    x = jnp.eye(4)

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        grads = eqx.filter_grad(lambda m: jnp.mean((jax.vmap(m)(x) - 1.0) ** 2))(model)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state

    trained, state = model, optimizer.init(eqx.filter(model, eqx.is_array))
    for _ in range(5):
        trained, state = step(trained, state)
    for before, after in zip(model.layers, trained.layers, strict=True):
        assert_means_kept(before.weight, after.weight, (1,))


# --- errors ---------------------------------------------------------------------------------------


def of_haiku(x: Any) -> Any:
    return hk.Linear(1)(x)


WITHOUT_LAYERS = {
    "linen": (OfLinen(), "flax.linen"),
    "haiku": (hk.transform(of_haiku), "haiku"),
    "haiku with state": (hk.transform_with_state(of_haiku), "haiku"),
}


@pytest.mark.parametrize(("model", "module"), WITHOUT_LAYERS.values(), ids=WITHOUT_LAYERS)
def test_model_that_has_no_layers_yet(model: Any, module: str) -> None:
    message = (
        f"a {module} model has no layers before it sees an input: give gcx.optax.layouts(model, "
        "*example_inputs), where an example input is an array or jax.ShapeDtypeStruct(shape, dtype)"
    )
    for use in (gcx.optax.centralize, gcx.optax.plan, partial(gcx.optax.plan, {})):
        with pytest.raises(TypeError, match=re.escape(message)):
            use(model)
    for shape in ((2, 7, 7, 3), [2, 7], ((2, 7), "float32")):
        with pytest.raises(TypeError, match=r"^an example input is an array or jax\.ShapeD.*, not"):
            gcx.optax.layouts(model, shape)
    with pytest.raises((AttributeError, IndexError, TypeError, ValueError)) as error:
        gcx.optax.layouts(model, 7)
    assert any("jax.ShapeDtypeStruct(shape, dtype)" in note for note in error.value.__notes__)
    for models in ([model], {"a": model}):
        with pytest.raises(TypeError, match=r"give gcx\.optax\.layouts\(model, "):
            gcx.optax.centralize(models)
        with pytest.raises(TypeError, match=r"model is an nnx, linen or .* not (list|dict)"):
            gcx.optax.layouts(models, IMAGES)


@pytest.mark.parametrize(
    "wrap", [lambda gc: gc, partial(optax.masked, mask={"a": True, "b": False}), optax.flatten]
)
def test_parameters_of_another_model(wrap: Callable[[Any], Any]) -> None:
    optimizer = wrap(gcx.optax.centralize(OfNnx()))
    message = r"(?s)nothing to centralize in .*\n[a ] .*: the model has no parameter of this name"
    with pytest.raises(ValueError, match=message):
        optimizer.init({"a": jnp.zeros((4, 3)), "b": jnp.zeros((4, 3))})


def test_names_of_linen_are_those_within_params() -> None:
    model, x = nn.Dense(4), jnp.zeros((2, 3))
    variables, layouts = model.init(KEY, x), gcx.optax.layouts(model, x)
    for given in (layouts, {"kernel": "...o", "*": None}):
        with pytest.raises(ValueError, match=r"these are names in variables\[.params.\]"):
            gcx.optax.centralize(given).init(variables)
    both = {**variables, "kernel": jnp.ones((3, 4))}
    assert [row.reason for row in gcx.optax.plan(both, {"kernel": "...o"}) if row.layout]
    whole = {f"params/{name}": layout for name, layout in layouts.items()}
    gcx.optax.centralize(whole).init(variables)
    rows = gcx.optax.plan(variables, whole | {"params/bias": None})
    assert [row[1:] for row in rows] == [((4,), None, "as given"), ((3, 4), Layout("io"), "Dense")]
