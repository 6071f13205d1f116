"""The code on the page to paste agrees with gcx."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gcx

import libraries
from test_documents import blocks

PAGE = Path(__file__).parents[2] / "docs" / "paste.md"


@pytest.fixture(scope="module")
def pasted() -> dict[str, Any]:
    ((_, code, _),) = blocks(PAGE, "python")
    assert len(code.splitlines()) <= 30
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 - to paste is the test
    return names


@pytest.mark.parametrize("layout", ["o...", "...o", "io...", "b...o"])
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_operator_agrees_on_random_shapes(
    pasted: dict[str, Any], library: str, layout: str
) -> None:
    if not libraries.installed(library):
        pytest.skip(f"needs {library}")
    array_library = libraries.MAKERS[library]()[0]
    rng = np.random.default_rng(0)
    for _ in range(20):
        shape = tuple(rng.integers(1, 6, rng.integers(2, 5)))
        grad = array_library.asarray(rng.standard_normal(shape), "float32")
        axes = gcx.Layout(layout).fan_in_axes(len(shape))
        strength = float(rng.uniform())
        ours = pasted["centralize"](grad, None if layout == "o..." else axes, strength)
        theirs = gcx.centralize(grad, layout=layout, strength=strength)
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(
            array_library.numpy(ours), array_library.numpy(theirs), rtol=0, atol=1e-6
        )


def test_torch_loop_does_what_the_plan_says(pasted: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    import gcx.torch

    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2)
    model = torch.nn.Sequential(*layers)
    model(torch.rand(5, 3, 4, 4)).square().mean().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    gcx.centralize_many(expected, layouts=gcx.torch.plan(model), out=expected)
    pasted["centralize_grads_"](model)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name])


def test_kernels_of_an_nnx_model(pasted: dict[str, Any]) -> None:
    jax, nnx = pytest.importorskip("jax"), pytest.importorskip("flax.nnx")
    layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    grads = nnx.grad(lambda layer: (layer(jax.numpy.arange(8.0).reshape(2, 4)) ** 2).mean())(layer)
    ours = pasted["centralize_kernels"](grads)
    expected = gcx.centralize(grads["kernel"][...], layout="io")
    np.testing.assert_allclose(ours["kernel"][...], expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(ours["bias"][...], grads["bias"][...])


def test_kernels_of_a_flax_model_as_the_plan_says(pasted: dict[str, Any]) -> None:
    jax = pytest.importorskip("jax")
    import gcx.optax

    shapes = {"kernel": (3, 3, 2, 4), "bias": (4,)}, {"kernel": (16, 3), "bias": (3,)}
    conv, dense = (
        {name: jax.random.normal(jax.random.key(0), shape) for name, shape in of_one.items()}
        for of_one in shapes
    )
    grads = {"Conv_0": conv, "Dense_0": dense}
    expected = gcx.centralize_many(grads, layouts=gcx.optax.plan(grads, "flax"))
    ours = pasted["centralize_kernels"](grads)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), ours, expected)
