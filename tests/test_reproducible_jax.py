"""reproducible=True inside programs of JAX, of which XLA may make what it likes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

import gcx
from gcx.backends._jax import double_precision

import canonical_order
from canonical_order import DTYPES, SEGMENT
from same_bits import assert_same_bits

pytestmark = pytest.mark.one_framework

centralize = partial(gcx.centralize, reproducible=True)


@pytest.fixture(autouse=True)
def all_dtypes() -> Any:
    with double_precision():
        yield


def draw(dtype: str, shape: tuple[int, ...] = (33, 300), seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * np.exp2(rng.integers(-5, 5, shape)), dtype)


def wide(x: Any, dtype: str) -> Any:
    return np.asarray(x).astype(canonical_order.working_dtype(dtype))


def assert_canonical(found: Any, grad: Any, dtype: str, strength: float = 1.0) -> None:
    expected = canonical_order.centralized(wide(grad, dtype), (1,), dtype, strength)
    assert_same_bits(wide(found, dtype), expected)


@pytest.mark.parametrize(
    ("fan_in", "dtype"),
    [(300, dtype) for dtype in DTYPES]
    + [(fan_in, "float32") for fan_in in (2, 27, SEGMENT + 1, 3 * SEGMENT + 5)],
)
def test_inside_jit(fan_in: int, dtype: str) -> None:
    grad = draw(dtype, (5, fan_in))
    assert_canonical(jax.jit(centralize)(grad), grad, dtype)


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_around_it_are_rounded(dtype: str, strength: float) -> None:
    """XLA would join the product of the gradient with the subtraction of its mean."""

    @jax.jit
    def program(a: Any, b: Any) -> Any:
        centralized = centralize(a * b, strength=strength)
        return centralized, a - 0.1 * centralized, centralized * b + a

    a, b = draw(dtype, seed=1), draw(dtype, seed=2)
    found, _, _ = program(a, b)
    assert_canonical(found, a * b, dtype, strength)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_same_product_is_not_rounded_elsewhere(dtype: str) -> None:
    """Or the test above would say nothing."""
    a, b, c = (draw(dtype, seed=seed) for seed in range(3))
    joined, rounded = jax.jit(lambda a, b, c: a * b - c)(a, b, c), a * b - c
    with pytest.raises(AssertionError, match="differ"):
        assert_same_bits(np.asarray(joined), np.asarray(rounded))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inside_a_training_step(dtype: str) -> None:
    @jax.jit
    def step(weight: Any, x: Any) -> Any:
        grad = jax.grad(lambda weight: jnp.sum(jnp.tanh(x @ weight.T)))(weight)
        return grad, centralize(grad)

    grad, centralized = step(draw(dtype), draw(dtype, (20, 300), seed=1))
    assert_canonical(centralized, grad, dtype)


def in_a_scan(function: Callable[[Any], Any], stack: Any) -> Any:
    return jax.lax.scan(lambda carry, grad: (carry, function(grad)), 0, stack)[1]


def together(function: Callable[[Any], Any], stack: Any) -> Any:
    return jax.vmap(function)(stack)


@pytest.mark.parametrize("transform", [jax.lax.map, in_a_scan, together])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_several_in_one_program(transform: Callable[..., Any], dtype: str) -> None:
    stack = draw(dtype, (3, 33, 300))
    for found, grad in zip(transform(centralize, stack), stack, strict=True):
        assert_canonical(found, grad, dtype)


def test_without_double_precision() -> None:
    # Releases before 0.8 have it among the experiments.
    off = jax.enable_x64(False) if hasattr(jax, "enable_x64") else jax.experimental.disable_x64()
    with off:
        assert jnp.ones(1, int).dtype == "int32"
        grad = draw("float32")
        assert_canonical(centralize(grad), grad, "float32")
        assert_canonical(jax.jit(centralize)(grad), grad, "float32")


def test_derivative_is_that_of_the_default() -> None:
    grad, weight = draw("float64"), draw("float64", seed=1)

    def derivative(operator: Callable[[Any], Any]) -> Any:
        return jax.grad(lambda x: jnp.sum(weight * operator(x) ** 2))(grad)

    found, expected = derivative(centralize), derivative(gcx.centralize)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_program_for_a_gpu_is_refused() -> None:
    traced = jax.jit(centralize).trace(draw("float32"))
    traced.lower(lowering_platforms=("cpu",))
    with pytest.raises(TypeError, match=r"reproducible=True is for JAX on a CPU.*cuda"):
        traced.lower(lowering_platforms=("cuda",))
