"""Adaptive gradient clipping with a plan, on layers where implementations by rank go wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from recipes import CLIPPING, EPS, clip_by_hand, gradient_and_weight, recipe

# Layer, layout, and True if the clipping of pytorch_optimizer has the same axes.
LAYERS = [
    ("Linear", (6, 4), "oi", True),
    ("Conv2d", (6, 4, 3), "oiii", True),
    ("Conv1d", (6, 4, 3), "oii", False),
    ("Bilinear", (3, 2, 4), "oii", False),
    ("ConvTranspose1d", (6, 4, 3), "ioi", False),
]


@pytest.mark.parametrize("against", ["by_hand", "pytorch_optimizer"])
@pytest.mark.parametrize(("kind", "options", "letters", "is_right"), LAYERS)
def test_torch(
    kind: str, options: tuple[int, ...], letters: str, is_right: bool, against: str
) -> None:
    torch = pytest.importorskip("torch")
    import gcx.torch

    layer = getattr(torch.nn, kind)(*options).double()
    grad, values = gradient_and_weight(*layer.weight.shape)
    layer.weight.data = torch.from_numpy(values)
    layer.weight.grad = torch.from_numpy(grad.copy())
    layer.bias.grad = torch.full_like(layer.bias, 100.0)
    recipe("clip_adaptively")(layer, gcx.torch.plan(layer), CLIPPING, EPS)
    expected = clip_by_hand(grad, values, letters)
    if against == "pytorch_optimizer":
        peer = pytest.importorskip("pytorch_optimizer.optimizer.agc")
        theirs = peer.agc(layer.weight.data, torch.from_numpy(grad), EPS, CLIPPING)
        assert np.allclose(theirs, expected) == is_right
        return
    np.testing.assert_allclose(layer.weight.grad, expected, rtol=1e-12)
    assert (layer.bias.grad == 100).all()


# By name: shape, layout, and True if the clipping of optax has the same axes.
KERNELS: dict[str, tuple[tuple[int, ...], str, bool]] = {
    "dense": ((4, 6), "io", True),
    "query": ((4, 2, 3), "ioo", True),
    "out": ((2, 3, 4), "iio", False),
    "conv1d": ((3, 4, 6), "iio", False),
    "conv2d": ((3, 3, 4, 6), "iiio", True),
    "scanned": ((3, 4, 6), "bio", False),
}


def test_optax() -> None:
    optax = pytest.importorskip("optax")
    pytest.importorskip("flax")  # of the model on the page
    import jax.numpy as jnp

    drawn = {name: gradient_and_weight(*shape) for name, (shape, _, _) in KERNELS.items()}
    grads, params = ({name: jnp.asarray(pair[k]) for name, pair in drawn.items()} for k in (0, 1))
    layouts = {**{name: layout for name, (_, layout, _) in KERNELS.items()}, "bias": None}
    extra: dict[str, Any] = {"bias": jnp.full(3, 100.0), "absent": None}
    clipped, _ = recipe("adaptive_grad_clip")(layouts, CLIPPING, EPS).update(
        {**grads, **extra}, optax.EmptyState(), {**params, **extra}
    )
    assert (clipped["bias"] == 100).all()
    theirs, _ = optax.adaptive_grad_clip(CLIPPING, EPS).update(grads, optax.EmptyState(), params)
    for name, (_, letters, is_right) in KERNELS.items():
        expected = clip_by_hand(*drawn[name], letters)
        np.testing.assert_allclose(clipped[name], expected, rtol=1e-5)
        assert np.allclose(theirs[name], expected, rtol=1e-4) == is_right
