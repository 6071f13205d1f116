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
from gcx.plan import LeaveAlone, Plan
from gcx.testing import assert_centralized

from jax_models import KEY, OfEquinox, OfLinen, OfNnx, made, params_of, plan_of, said
from reference import centralized

pytestmark = pytest.mark.usefixtures("compiled_in_haste")


def test_layers_of_others_register_a_rule() -> None:
    class Experts(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.zeros((2, 3, 4)))
            self.gate = nnx.Param(jnp.zeros((3, 2)))
            self.bias_in = nnx.Param(jnp.zeros((2, 4)))

    rule = {"w": "oio", "gate": None, "bias_*": LeaveAlone("bias of an expert")}
    gcx.optax.register_layer(Experts)(rule)
    assert said(plan_of(Experts())) == {
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


@pytest.mark.parametrize(
    ("make", "eval_shape", "count"),
    [(OfNnx, nnx.eval_shape, "11 of 17"), (OfEquinox, eqx.filter_eval_shape, "8 of 17")],
)
def test_a_model_is_layouts_and_parameters(make: Any, eval_shape: Any, count: str) -> None:
    """As are its layouts, and the shapes of it."""
    model, shapes = make(), eval_shape(make)
    params = params_of(model)
    plan = gcx.optax.plan(params, model)
    assert count in repr(Plan(row for row in plan if row.reason != "not an array"))
    assert not any("unknown" in row.reason for row in plan)
    assert gcx.optax.layouts(shapes) == gcx.optax.layouts(model)
    assert gcx.optax.plan(params, gcx.optax.layouts(model)) == plan
    assert gcx.optax.plan(model) == gcx.optax.plan(shapes) == plan
    with pytest.raises(TypeError, match="needs no example inputs: give it alone"):
        gcx.optax.layouts(model, jnp.zeros((2, 3)))


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x: Any, *, train: bool, scale: Any = 1, more: Any = None) -> Any:
        if more is not None:
            assert isinstance(more["y"], jax.core.Tracer)
            x = x @ (more["y"] if scale == 2 else 0)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(4, kernel_init=_traced)(x)

    def encode(self, x: Any) -> Any:
        return self(x, train=False)


def _traced(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    value = jax.random.normal(key, shape, dtype)
    assert isinstance(value, jax.core.Tracer)
    return value


def test_linen_is_traced_and_nothing_computed() -> None:
    x = jax.ShapeDtypeStruct((2, 3), "float32")
    names = {"BatchNorm_0/bias", "BatchNorm_0/scale", "Dense_0/bias", "Dense_0/kernel"}
    assert set(gcx.optax.layouts(Noisy(), x, train=True)) == names
    assert set(gcx.optax.layouts(Noisy(), x, method="encode")) == names
    options = {"train": False, "scale": 2, "more": {"y": jnp.ones((3, 4))}}
    assert gcx.optax.layouts(Noisy(), x, **options)["Dense_0/kernel"] == Layout("io")


def test_part_of_a_model_may_be_trained() -> None:
    model = OfNnx()
    nnx.Optimizer(model, gcx.optax.centralize(model), wrt=nnx.LoRAParam)
    rows = gcx.optax.plan(nnx.state(model, nnx.LoRAParam), model)
    assert [row.name for row in rows if row.layout] == [f"adapted/lora/lora_{k}" for k in "ab"]


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
    assert_centralized(state.params["kernel"], start=params["kernel"], layout="...o", rtol=1e-7)


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
        assert_centralized(after.weight, start=before.weight, rtol=1e-7)


WITHOUT_LAYERS = {
    "linen": (OfLinen(), "flax.linen"),
    "haiku": (hk.transform(made(hk.Linear, 1)), "haiku"),
    "haiku with state": (hk.transform_with_state(made(hk.Linear, 1)), "haiku"),
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
    for no_array in ((2, 7, 7, 3), ((2, 7), "float32"), 7):
        with pytest.raises((AttributeError, IndexError, TypeError, ValueError)) as error:
            gcx.optax.layouts(model, no_array)
        assert any("jax.ShapeDtypeStruct(shape, dtype)" in note for note in error.value.__notes__)
    for models in ([model], {"a": model}):
        for use in (gcx.optax.layouts, gcx.optax.centralize):
            with pytest.raises(TypeError, match=r"an nnx, linen or Equ|an nnx or Equinox|has a "):
                use(models)


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
    with pytest.raises(ValueError, match=r"'bias' .* there are: params/bias, params/kernel"):
        gcx.optax.centralize(layouts).init(variables)
    whole = {f"params/{name}": layout for name, layout in layouts.items()}
    gcx.optax.centralize(whole).init(variables)
    rows = gcx.optax.plan(variables, whole | {"params/bias": None})
    assert [row[1:] for row in rows] == [((4,), None, "as given"), ((3, 4), Layout("io"), "Dense")]
