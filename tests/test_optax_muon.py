"""`gcx.optax.muon_dimension_numbers` against an orthogonalization of each layer alone."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from optax.contrib import MuonDimensionNumbers

import gcx.optax
from gcx import Layout

from jax_models import IMAGES, KEY, OfLinen, made, params_of
from optax_training import normal, normal_like, struct

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

RATE = 0.1


def muon(numbers: Any) -> Any:
    return optax.contrib.muon(RATE, muon_weight_dimension_numbers=numbers)


ATTENTION = "MultiHeadDotProductAttention_0"
# The axes of each matrix, by hand: stack, fan-in, output.
MATRICES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    **{f"{ATTENTION}/{name}/kernel": ((), (0,), (1, 2)) for name in ("query", "key", "value")},
    f"{ATTENTION}/out/kernel": ((), (0, 1), (2,)),
    "Conv_0/kernel": ((), (0, 1, 2), (3,)),
    "ConvTranspose_0/kernel": ((), (0, 1, 2), (3,)),
    "ConvTranspose_1/kernel": ((), (0, 1, 3), (2,)),
    "scanned/Dense_0/kernel": ((0,), (1,), (2,)),
    "DenseGeneral_0/kernel": ((), (0,), (1, 2)),
    "DenseGeneral_1/kernel": ((), (0, 1), (2,)),
    "Einsum_0/kernel": ((), (1,), (0, 2)),
}
EXCLUDED, ONE_OUTPUT = "Conv_1/kernel", "Dense_0/kernel"


def orthogonalized(matrix: Any) -> Any:
    """Apply Muon's polynomial to the singular values of one matrix."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    fan_in, outputs = matrix.shape
    return np.sqrt(max(1, outputs / fan_in)) * (left * values) @ right


def by_layer(grad: Any, stack: Any, fan_in: Any, outputs: Any) -> Any:
    """Orthogonalize each layer of a stack alone."""
    order = (*stack, *fan_in, *outputs)
    turned = np.transpose(grad, order)
    sizes = [int(np.prod([grad.shape[k] for k in axes])) for axes in (stack, fan_in, outputs)]
    layers = np.stack([orthogonalized(layer) for layer in turned.reshape(sizes)])
    return np.transpose(layers.reshape(turned.shape), np.argsort(order))


def test_every_weight_of_a_model_is_orthogonalized_by_its_layer() -> None:
    shapes = jax.tree.map(lambda x: struct(*x.shape), params_of(OfLinen(), IMAGES))
    params = normal_like(1, shapes)
    grads = normal_like(100, params)
    layouts = gcx.optax.layouts(OfLinen(), IMAGES)
    numbers = gcx.optax.muon_dimension_numbers(params, layouts, exclude="Conv_1/*")
    optimizer = muon(numbers)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    adam = optax.adamw(RATE, weight_decay=0.0, nesterov=True)
    by_adam, _ = adam.update(grads, adam.init(params), params)
    rows = gcx.optax.plan(params, layouts)
    assert {row.name for row in rows if row.layout} == {*MATRICES, EXCLUDED, ONE_OUTPUT}
    for row, grad, update, plain in zip(
        rows, *map(jax.tree.leaves, (grads, updates, by_adam)), strict=True
    ):
        axes = MATRICES.get(row.name)
        expected = -RATE * by_layer(np.asarray(grad), *axes) if axes else plain
        np.testing.assert_allclose(update, expected, rtol=1e-6, atol=1e-9, err_msg=row.name)


RNGS = nnx.Rngs(0)
OF_NNX = nnx.Sequential(
    nnx.Embed(7, 4, rngs=RNGS), nnx.Linear(4, 2, rngs=RNGS), nnx.Linear(2, 1, rngs=RNGS)
)


@pytest.mark.parametrize(("model", "matrices"), [(OF_NNX, 1), (eqx.nn.MLP(4, 3, 5, 1, key=KEY), 2)])
def test_trees_of_modules(model: Any, matrices: int) -> None:
    params = params_of(model)
    optimizer = muon(gcx.optax.muon_dimension_numbers(params, model))
    state = optimizer.init(params)
    momentum = jax.tree.leaves(state.inner_states["muon"].inner_state[0].mu)
    assert len(momentum) == matrices
    updates, _ = optimizer.update(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_numbers_serve_galore() -> None:
    params = {"query": normal(1, 4, 2, 3), "bias": normal(2, 3)}
    numbers = gcx.optax.muon_dimension_numbers(params, {"query": "ioo"})
    numbers = jax.tree.map(
        lambda found: optax.contrib.GaLoreDimensionNumbers(*found),
        numbers,
        is_leaf=lambda found: isinstance(found, MuonDimensionNumbers),
    )
    optimizer = optax.contrib.galore(RATE, rank=1, weight_dimension_numbers=numbers)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert np.linalg.matrix_rank(updates["query"].reshape(4, 6)) == 1


class Grouped(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return nn.Conv(4, (3,), feature_group_count=2)(x), None


def unrolled(cell: Any) -> Any:
    core = cell(8)
    return lambda x: hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))


X, TWO = struct(1, 5, 4), {"feature_group_count": 2}
SCANNED = nn.scan(Grouped, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
GROUPED: dict[str, tuple[Any, ...]] = {
    "linen": (nn.Conv(8, (3,), **TWO), X),
    "scan": (SCANNED(), X, None),
    "nnx": (nnx.Conv(4, 8, (3,), **TWO, rngs=RNGS),),
    "equinox": (eqx.nn.Conv1d(4, 8, 3, groups=2, key=KEY),),
    "equinox, transposed": (eqx.nn.ConvTranspose1d(4, 8, 3, groups=2, key=KEY),),
    "equinox, GRU": (eqx.nn.GRUCell(4, 8, key=KEY),),
    "equinox, LSTM": (eqx.nn.LSTMCell(4, 8, key=KEY),),
    "haiku": (hk.transform(made(hk.Conv1D, 8, 3, **TWO)), X),
    "haiku, GRU": (hk.transform(made(unrolled, hk.GRU)), X),
    "haiku, depthwise": (hk.transform(made(hk.DepthwiseConv1D, 2, 3)), X),
}


@pytest.mark.parametrize("model", GROUPED.values(), ids=GROUPED)
def test_groups_and_gates_are_named(model: tuple[Any, ...]) -> None:
    params, layouts = params_of(*model), gcx.optax.layouts(*model)
    for given in (layouts, gcx.optax.plan(params, layouts)):
        with pytest.raises(ValueError, match=r"name in exclude= .*( in groups|, all gates)\)$"):
            gcx.optax.muon_dimension_numbers(params, given)
    numbers = gcx.optax.muon_dimension_numbers(params, layouts, exclude="*")
    # Muon calls whatever is callable, such as the function for an Equinox layer.
    assert jax.tree.leaves(numbers(params) if callable(numbers) else numbers) == []


def test_errors() -> None:
    whole = nn.Conv(8, (3,)), X
    numbers = gcx.optax.muon_dimension_numbers(params_of(*whole), gcx.optax.layouts(*whole))
    assert numbers["kernel"] == ((0, 1), (2,))  # without groups it is none
    params = {"w": normal(1, 4, 3), "v": normal(2, 4)}
    with pytest.raises(ValueError, match="exclude: 'head' matches no parameter; there are: v, w"):
        gcx.optax.muon_dimension_numbers(params, {"w": "io"}, exclude=["head"])
    wrong: tuple[Any, ...] = (3, None, [3])
    for exclude in wrong:
        with pytest.raises(TypeError, match=r"exclude: a key is the name of a parameter .* not"):
            gcx.optax.muon_dimension_numbers(params, {"w": "io"}, exclude=exclude)
    split = {"w": Layout("(bi)o", b=2), "v": "i"}
    with pytest.raises(ValueError, match=r"cannot split an axis: .* w \(Layout\(.*, as given\)$"):
        gcx.optax.muon_dimension_numbers(params, split)
    assert gcx.optax.muon_dimension_numbers(params, split, exclude="w") == {"w": None, "v": None}
