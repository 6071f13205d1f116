"""reproducible=True inside programs of JAX, of which XLA may make what it likes.

A division by a constant becomes a product with its reciprocal, a product and a sum become one
operation, a conversion to a narrow dtype and back is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gcx

import canonical_order
from canonical_order import DTYPES, SEGMENT
from same_bits import assert_same_bits

centralize = partial(gcx.centralize, reproducible=True)


def draw(dtype: str, shape: tuple[int, ...] = (33, 300), seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * np.exp2(rng.integers(-5, 5, shape)), dtype)


# Shapes and their fan-in, then every dtype with a part of the mean and with all of it.
PRODUCTS = [
    ((4000, 2), (1,), "float32", 0.3),
    ((9, 50, 8), (0, 2), "float32", 0.3),
    ((1, 1000), (1,), "float32", 0.3),
    ((2, 3 * SEGMENT + 5), (1,), "float32", 0.3),
    *[((7, 700), (0,), dtype, strength) for dtype in DTYPES for strength in (0.3, 1.0)],
]


@pytest.mark.parametrize(("shape", "axes", "dtype", "strength"), PRODUCTS, ids=str)
class TestProducts:
    """XLA would join the product of the gradient with the subtraction of its mean."""

    @pytest.fixture(autouse=True)
    def numbers(self, shape: Any, axes: Any, dtype: str, strength: float) -> None:
        rng = np.random.default_rng(0)
        self.x, self.y = (jnp.asarray(rng.normal(1.0, 1.0, shape), dtype) for _ in range(2))
        product = np.asarray(self.x * self.y).astype(canonical_order.working_dtype(dtype))
        self.expected = canonical_order.centralized(product, axes, dtype, strength)

    @pytest.fixture
    def program(self, axes: Any, strength: float) -> Callable[[Any, Any], Any]:
        return lambda x, y: centralize(x * y, axis=axes, strength=strength)

    def assert_bits(self, result: Any) -> None:
        assert result.dtype == self.x.dtype
        assert_same_bits(np.asarray(result.astype(self.expected.dtype)), self.expected)

    def test_eager(self, program: Any) -> None:
        self.assert_bits(program(self.x, self.y))

    def test_jit(self, program: Any) -> None:
        self.assert_bits(jax.jit(program)(self.x, self.y))

    def test_jit_with_the_result_widened(self, program: Any) -> None:
        in_wide = jax.jit(lambda x, y: program(x, y).astype(self.expected.dtype))
        assert_same_bits(np.asarray(in_wide(self.x, self.y)), self.expected)

    def test_jit_with_products_of_the_result(self, program: Any) -> None:
        @jax.jit
        def step(x: Any, y: Any) -> Any:
            centralized = program(x, y)
            return centralized, x - 0.1 * centralized, centralized * y + x

        self.assert_bits(step(self.x, self.y)[0])

    def test_vmap(self, program: Any) -> None:
        for axis in range(self.x.ndim):
            batches = (jnp.stack([array, array], axis) for array in (self.x, self.y))
            mapped = jax.jit(jax.vmap(program, axis, axis))(*batches)
            self.assert_bits(jnp.take(mapped, 1, axis))

    def test_scan(self, program: Any) -> None:
        def step(carry: Any, array: Any) -> tuple[Any, Any]:
            return carry, program(carry, array)

        _, results = jax.jit(lambda x, ys: jax.lax.scan(step, x, ys))(self.x, self.y[None])
        self.assert_bits(results[0])

    def test_beside_the_derivative(self, program: Any) -> None:
        value, _ = jax.jit(lambda x, y: jax.jvp(program, (x, y), (y, x)))(self.x, self.y)
        self.assert_bits(value)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_same_product_is_not_rounded_elsewhere(dtype: str) -> None:
    """Or the tests above would say nothing."""
    a, b, c = (draw(dtype, seed=seed) for seed in range(3))
    joined, rounded = jax.jit(lambda a, b, c: a * b - c)(a, b, c), a * b - c
    with pytest.raises(AssertionError, match="differ"):
        assert_same_bits(np.asarray(joined), np.asarray(rounded))


def test_without_double_precision() -> None:
    off = jax.enable_x64(False) if hasattr(jax, "enable_x64") else jax.experimental.disable_x64()
    with off:
        assert jnp.ones(1, int).dtype == "int32"
        grad = draw("float32")
        expected = canonical_order.centralized(np.asarray(grad), (1,), "float32")
        for run in (centralize, jax.jit(centralize)):
            assert_same_bits(np.asarray(run(grad)), expected)


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_derivative_is_that_of_the_default(strength: float) -> None:
    grad, weight = draw("float64"), draw("float64", seed=1)

    def derivative(operator: Callable[..., Any]) -> Any:
        return jax.grad(lambda x: jnp.sum(weight * operator(x, strength=strength) ** 2))(grad)

    found, expected = derivative(centralize), derivative(gcx.centralize)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_without_jit() -> None:
    grad = draw("float32", (5, 300))
    with jax.disable_jit():
        plain = centralize(grad)
    assert_same_bits(np.asarray(plain), np.asarray(centralize(grad)))


def test_is_refused_where_it_is_compiled_for_no_cpu() -> None:
    traced = jax.jit(centralize).trace(draw("float32"))
    traced.lower(lowering_platforms=("cpu",))
    for platform in ("cuda", "tpu"):
        with pytest.raises(TypeError, match=f"on a CPU, and this is compiled for {platform}"):
            traced.lower(lowering_platforms=(platform,))


def test_is_refused_for_an_array_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    grad = draw("float32")
    monkeypatch.setattr(type(grad), "devices", lambda _: [SimpleNamespace(platform="gpu")])
    with pytest.raises(TypeError, match="on a CPU, and this array is on gpu"):
        centralize(grad)
