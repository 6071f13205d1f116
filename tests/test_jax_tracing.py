"""Inside the machinery of JAX: jitted, vmapped, differentiated, abstract and exported."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gcx
import gcx.optax


def weight(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), "float32")


def pairs(one: Any, other: Any) -> Any:
    return zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)


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
        for jitted, plain in pairs(jax.jit(program)(grad), program(grad)):
            assert jitted.dtype == plain.dtype
            np.testing.assert_array_equal(jitted, plain)

    def test_vmap(self, program: Callable[[Any], Any]) -> None:
        batch = weight(5, 4, 3, 2)
        one_by_one = jax.tree.map(lambda *x: jnp.stack(x), *[program(grad) for grad in batch])
        for mapped, expected in pairs(jax.vmap(program)(batch), one_by_one):
            np.testing.assert_allclose(
                mapped.astype("float32"), expected.astype("float32"), atol=1e-6
            )

    def test_abstract(self, program: Callable[[Any], Any]) -> None:
        abstract = jax.eval_shape(program, jax.ShapeDtypeStruct((4, 3, 2), jnp.float32))
        for shape, result in pairs(abstract, program(weight(4, 3, 2))):
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
    (transposed,) = jax.linear_transpose(program, grad)(direction)
    np.testing.assert_allclose(transposed, gcx.centralize(direction), atol=1e-6)
    projection = jax.jacobian(program)(grad[:1])[0, :, 0, :]
    np.testing.assert_allclose(projection, np.eye(4) - 1 / 4, atol=1e-6)


def test_errors_come_while_tracing() -> None:
    with pytest.raises(ValueError, match=r"layout 'ioo' is for arrays of rank 3.*\(3, 4\)"):
        jax.jit(partial(gcx.centralize, layout="ioo"))(weight(3, 4))
    with pytest.raises(TypeError, match=r"strength is a Python number, not a \w*Tracer.* static"):
        jax.jit(lambda g, strength: gcx.centralize(g, strength=strength))(weight(3, 4), 0.5)


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


@pytest.mark.parametrize("layout", ["o...", "ioi"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("adapter", [False, True], ids=["gcx", "optax"])
def test_export_with_sizes_that_are_symbols(layout: str, strength: float, adapter: bool) -> None:
    transform = gcx.optax.centralize({"*": layout}, strength=strength)
    program = jax.jit(partial(gcx.centralize, layout=layout, strength=strength))
    if adapter:
        program = jax.jit(lambda grad: transform.update([grad], None)[0][0])
    exported = export.export(program)(symbols("a, b, c"))
    for sizes in ((4, 3, 2), (1, 3, 1), (3, 1, 1)):  # some with a fan-in of 1
        grad = weight(*sizes)
        np.testing.assert_allclose(exported.call(grad), program(grad), atol=1e-6)


def symbols(names: str) -> Any:
    return jax.ShapeDtypeStruct(export.symbolic_shape(names), jnp.float32)


def test_export_of_a_split_fan_in_whose_size_is_a_symbol() -> None:
    transform = gcx.optax.centralize({"*": "o..."}, axis_name="x")
    program = jax.shard_map(
        lambda grad: transform.update([grad], None)[0][0],
        mesh=jax.make_mesh((1,), ("x",), (AxisType.Auto,)),
        in_specs=P(None, "x"),
        out_specs=P(None, "x"),
    )
    exported = export.export(jax.jit(program))(symbols("a, b"))
    for sizes in ((3, 2), (3, 1)):
        grad = weight(*sizes)
        np.testing.assert_allclose(exported.call(grad), gcx.centralize(grad), atol=1e-6)


def test_export_reproducible_needs_a_known_fan_in() -> None:
    program = partial(gcx.centralize, reproducible=True)
    found = export.export(jax.jit(program))(symbols("a, 3")).call(weight(4, 3))
    np.testing.assert_array_equal(found, program(weight(4, 3)))
    with pytest.raises(TypeError, match=r"reproducible=True needs .* known size"):
        export.export(jax.jit(program))(symbols("a, b"))
