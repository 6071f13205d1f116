"""JAX in the canonical order, on a CPU, protected from the rewriting of XLA.

XLA replaces a division by a constant with a multiplication by the reciprocal, so divisors are not
constants here. LLVM fuses a product with the sum after it, without rounding the product, so
`_round` keeps them apart. XLA drops a conversion to a narrow dtype and back, so narrow arrays pass
through a barrier.
"""

from __future__ import annotations

from functools import reduce
from math import prod
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from gcx.backends._canonical import SEGMENT, halve


def centralize(grad: jax.Array, strength: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Compute ``grad - strength * mean(grad, axes)``; compiling it for a GPU is a TypeError."""
    if not grad.size:
        return grad
    is_narrow = grad.dtype.itemsize < 4
    wide = _widen(grad)
    mean = _divide(_sum(wide, axes), prod(grad.shape[a] for a in axes))
    result = wide - _round(mean * jnp.asarray(strength, mean.dtype))
    return _keep_dtype(result.astype(grad.dtype)) if is_narrow else result


def fan_in_mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Average over `axes`, which stay with size 1; compiling it for a GPU is a TypeError."""
    return _divide(_sum(_widen(x), axes), prod(x.shape[a] for a in axes))


def _widen(x: jax.Array) -> jax.Array:
    x = _on_cpu.bind(x)  # type: ignore[no-untyped-call]
    return _round(_keep_dtype(x).astype(jnp.float32) if x.dtype.itemsize < 4 else x)


def _sum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sum over `axes`, which stay with size 1."""
    first, stop = axes[0], axes[0] + len(axes)
    moved = jnp.moveaxis(x, axes, range(first, stop))
    merged = moved.reshape(*moved.shape[:first], -1, *moved.shape[stop:])
    along = _sum_segments
    for _ in range(first):  # moving the axis would copy the array in JAX
        along = jax.vmap(along)
    return along(merged).reshape([1 if a in axes else size for a, size in enumerate(x.shape)])


def _sum_segments(x: jax.Array) -> jax.Array:
    """Sum over the first axis."""
    whole = len(x) - len(x) % SEGMENT
    sums: list[jax.Array] = []
    if whole:
        sums.extend(jax.vmap(halve)(x[:whole].reshape(-1, SEGMENT, *x.shape[1:])))
    if whole < len(x):
        sums.append(halve(x[whole:]))
    return reduce(add, sums)


def _divide(x: jax.Array, divisor: int) -> jax.Array:
    return x / jnp.where(jnp.isnan(x), jax.lax.stop_gradient(x), divisor)


def _round(x: jax.Array) -> jax.Array:
    """Return the numbers unchanged, but make LLVM round them if they are products."""
    return jnp.where(jnp.isnan(x), jnp.nan, x)


def _keep_dtype(x: jax.Array) -> Any:
    """Return the array unchanged, but make XLA compute it in its own dtype."""
    return jax.lax.optimization_barrier(x)  # type: ignore[no-untyped-call]


# A traced array has no device yet; the compiler knows the platform.
_on_cpu = Primitive("gcx_reproducible")
_on_cpu.def_impl(lambda x: x)  # type: ignore[no-untyped-call]
_on_cpu.def_abstract_eval(lambda x: x)  # type: ignore[no-untyped-call]
ad.deflinear2(_on_cpu, lambda cotangent, _: [cotangent])  # type: ignore[no-untyped-call]
batching.primitive_batchers[_on_cpu] = lambda args, axes: (_on_cpu.bind(*args), axes[0])  # type: ignore[no-untyped-call]


def _refuse(context: Any, x: Any) -> Any:
    del x
    platforms = ", ".join(context.module_context.platforms)
    raise TypeError(f"reproducible=True is for JAX on a CPU, and this is compiled for {platforms}")


mlir.register_lowering(_on_cpu, _refuse)
mlir.register_lowering(_on_cpu, lambda _context, x: [x], platform="cpu")
