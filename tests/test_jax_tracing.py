"""Inside the machinery of JAX: jitted, vmapped, differentiated, abstract and sharded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

import gcx
from gcx.backends import _jax

import canonical_order
from reference import centralized
from same_bits import assert_same_bits

pytestmark = pytest.mark.one_framework


def weight(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), "float32")


PROGRAMS: dict[str, Callable[[Any], Any]] = {
    "default": gcx.centralize,
    "layout": partial(gcx.centralize, layout="...o"),
    "axis": partial(gcx.centralize, axis=(0, -1)),
    "strength": partial(gcx.centralize, strength=0.5),
    "low precision": lambda g: gcx.centralize(g.astype(jnp.bfloat16)),
    "reproducible": partial(gcx.centralize, reproducible=True, strength=0.3),
    "many": lambda g: gcx.centralize_many({"a": [g, None]}, layouts={"a/*": "...o"}),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
class TestPrograms:
    def test_jit(self, program: Callable[[Any], Any]) -> None:
        grad = weight(4, 3, 2)
        for jitted, plain in zip(
            jax.tree.leaves(jax.jit(program)(grad)), jax.tree.leaves(program(grad)), strict=True
        ):
            assert jitted.dtype == plain.dtype
            np.testing.assert_array_equal(jitted, plain)

    def test_vmap(self, program: Callable[[Any], Any]) -> None:
        batch = weight(5, 4, 3, 2)
        one_by_one = jax.tree.map(lambda *x: jnp.stack(x), *[program(grad) for grad in batch])
        for mapped, expected in zip(
            jax.tree.leaves(jax.vmap(program)(batch)), jax.tree.leaves(one_by_one), strict=True
        ):
            np.testing.assert_allclose(
                mapped.astype("float32"), expected.astype("float32"), atol=1e-6
            )

    def test_abstract(self, program: Callable[[Any], Any]) -> None:
        abstract = jax.eval_shape(program, jax.ShapeDtypeStruct((4, 3, 2), jnp.float32))
        for shape, result in zip(
            jax.tree.leaves(abstract), jax.tree.leaves(program(weight(4, 3, 2))), strict=True
        ):
            assert (shape.shape, shape.dtype) == (result.shape, result.dtype)

    def test_strict_promotion(self, program: Callable[[Any], Any]) -> None:
        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
            program(weight(3, 4, 5))


@pytest.mark.parametrize("reproducible", [False, True])
def test_derivative_is_the_projection_itself(reproducible: bool) -> None:
    program = partial(gcx.centralize, reproducible=reproducible)
    grad, direction = weight(3, 4), weight(4, 3).T
    _, tangent = jax.jvp(program, (grad,), (direction,))
    np.testing.assert_allclose(tangent, gcx.centralize(direction), atol=1e-6)
    _, pull_back = jax.vjp(program, grad)
    np.testing.assert_allclose(pull_back(direction)[0], gcx.centralize(direction), atol=1e-6)
    projection = jax.jacobian(program)(grad[:1])[0, :, 0, :]
    np.testing.assert_allclose(projection, np.eye(4) - 1 / 4, atol=1e-6)


def test_gradient_of_a_gradient() -> None:
    """A penalty on the centralized gradient of sum(w ** 3), minimised."""

    def penalty(w: Any) -> Any:
        return (gcx.centralize(jax.grad(lambda w: (w**3).sum())(w)) ** 2).sum()

    w = weight(3, 4)
    expected = 2 * centralized(3 * np.asarray(w) ** 2, (1,)) * 6 * np.asarray(w)
    np.testing.assert_allclose(jax.grad(penalty)(w), expected, rtol=1e-4, atol=1e-4)


def test_scan_over_steps_keeps_the_means() -> None:
    """Corollary 4.1, in a training loop that is one XLA program."""
    start = weight(3, 8)

    def step(w: Any, _: None) -> tuple[Any, None]:
        return w - 0.1 * gcx.centralize(jax.grad(lambda w: jnp.cos(w).sum())(w)), None

    end, _ = jax.jit(lambda w: jax.lax.scan(step, w, None, length=50))(start)
    assert float(jnp.abs(end - start).max()) > 0.1
    np.testing.assert_allclose(end.mean(1), start.mean(1), atol=1e-6)


# Inside a program XLA rewrites: a division by a constant becomes a product with its reciprocal, a
# product and a sum become one operation, a conversion to a narrow dtype and back is left out.


NUMBERS = [("float16", 0.3), ("bfloat16", 0.3), ("float32", 1.0), ("float64", 0.3)]
SHAPES = [
    ((4000, 2), (1,)),
    ((7, 700), (0,)),
    ((9, 50, 8), (0, 2)),
    ((1, 1000), (1,)),
    ((2, 20_000), (1,)),
]


# Each shape, and each dtype: they take their ways one after the other, so no pair has its own.
@pytest.mark.parametrize(
    ("shape", "axes", "dtype", "strength"),
    [(*shape, "float32", 0.3) for shape in SHAPES] + [(*SHAPES[1], *pair) for pair in NUMBERS],
    ids=str,
)
class TestReproducible:
    @pytest.fixture(autouse=True)
    def numbers(self, shape: Any, axes: Any, dtype: str, strength: float) -> Iterator[None]:
        rng = np.random.default_rng(0)
        with _jax.double_precision():
            self.x, self.y = (jnp.asarray(rng.normal(1.0, 1.0, shape), dtype) for _ in range(2))
            wide = np.asarray((self.x * self.y).astype(canonical_order.working_dtype(dtype)))
            self.expected = canonical_order.centralized(wide, axes, dtype, strength)
            yield

    @pytest.fixture
    def program(self, axes: Any, strength: float) -> Callable[[Any, Any], Any]:
        def centralized_product(x: Any, y: Any) -> Any:
            return gcx.centralize(x * y, axis=axes, strength=strength, reproducible=True)

        return centralized_product

    def assert_bits(self, result: Any) -> None:
        assert result.dtype == self.x.dtype
        assert_same_bits(np.asarray(result.astype(self.expected.dtype)), self.expected)

    def test_eager(self, program: Any) -> None:
        self.assert_bits(program(self.x, self.y))

    def test_jit(self, program: Any) -> None:
        self.assert_bits(jax.jit(program)(self.x, self.y))

    def test_jit_with_the_result_widened(self, program: Any) -> None:
        wide = jax.jit(lambda x, y: program(x, y).astype(self.expected.dtype))
        assert_same_bits(np.asarray(wide(self.x, self.y)), self.expected)

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


def test_reproducible_without_jit() -> None:
    grad = weight(5, 300)
    with jax.disable_jit():
        plain = gcx.centralize(grad, reproducible=True)
    assert_same_bits(np.asarray(plain), np.asarray(gcx.centralize(grad, reproducible=True)))


def test_reproducible_is_refused_where_it_is_compiled_for_no_cpu() -> None:
    traced = jax.jit(partial(gcx.centralize, reproducible=True)).trace(weight(3, 4))
    traced.lower(lowering_platforms=("cpu",))
    for platform in ("cuda", "tpu"):
        with pytest.raises(TypeError, match=f"on a CPU, and this is compiled for {platform}"):
            traced.lower(lowering_platforms=(platform,))


def test_reproducible_is_refused_for_an_array_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    grad = weight(3, 4)
    monkeypatch.setattr(type(grad), "devices", lambda _: [SimpleNamespace(platform="gpu")])
    with pytest.raises(TypeError, match="on a CPU, and this array is on gpu"):
        gcx.centralize(grad, reproducible=True)


def test_compiles_once_a_shape() -> None:
    gcx.centralize(weight(3, 7), layout="...o")
    compiled = _jax._centralize._cache_size()
    for layout in ("...o", "io...", gcx.Layout("...o")):
        gcx.centralize(weight(3, 7), layout=layout)
    assert _jax._centralize._cache_size() == compiled


def test_errors_come_while_tracing() -> None:
    with pytest.raises(ValueError, match=r"layout 'ioo' is for arrays of rank 3.*\(3, 4\)"):
        jax.jit(partial(gcx.centralize, layout="ioo"))(weight(3, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: jax.ShapeDtypeStruct((2, 3), jnp.float32),
        lambda: jax.random.key(0),
        lambda: jax.random.split(jax.random.key(0), 3),
        lambda: np.zeros((2, 3), jax.dtypes.float0),
        lambda: jnp.zeros((2, 3), jnp.int4),
    ],
    ids=["ShapeDtypeStruct", "key", "keys", "float0", "int4"],
)
def test_what_has_no_floating_numbers_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"floating dtype, not|expected an array"):
        gcx.centralize(make())


def test_traced_arrays_cannot_be_written_to() -> None:
    with pytest.raises(TypeError, match=r"out cannot be written to.*immutable"):
        jax.jit(lambda g: gcx.centralize(g, out=g))(weight(3, 4))


def test_sharded_arrays_stay_where_they_are() -> None:
    """On four devices, which one process makes out of the CPU."""
    script = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import gcx, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
assert jax.device_count() == 4
mesh = jax.make_mesh((2, 2), ("x", "y"), (jax.sharding.AxisType.Auto,) * 2)
numbers = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
for layout, axis in (("o...", 1), ("...o", 0)):
    expected = numbers - numbers.mean(axis, keepdims=True)
    for spec in (P("x", None), P(None, "y"), P("x", "y"), P(("x", "y"), None), P()):
        sharding = NamedSharding(mesh, spec)
        grad = jax.device_put(numbers, sharding)
        for run in (gcx.centralize, jax.jit(gcx.centralize, static_argnames="layout")):
            result = run(grad, layout=layout)
            assert result.sharding.is_equivalent_to(sharding, 2), (layout, spec, result.sharding)
            np.testing.assert_allclose(result, expected, atol=1e-6)
    grad = jax.device_put(numbers, jax.devices()[3])
    assert gcx.centralize(grad, layout=layout).devices() == {jax.devices()[3]}
"""
    run = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, check=False)
    assert run.returncode == 0, run.stderr.decode()
