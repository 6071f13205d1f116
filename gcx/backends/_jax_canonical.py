"""JAX in the canonical order, on a CPU, where XLA rewrites what can be rewritten.

It divides by a constant by multiplying with the reciprocal; LLVM joins a product and the sum after
it, unrounded; and between two conversions, to a narrow dtype and back, both are left out. So
divisors are no constants here, what may be a product passes through `_rounded`, and narrow arrays
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
from jax.interpreters import batching, mlir

from gcx.backends._canonical import SEGMENT, halved

__all__ = ["centralize", "fan_in_mean"]


def centralize(grad: jax.Array, axes: tuple[int, ...], strength: float) -> jax.Array:
    """Compute ``grad - strength * mean(grad, axes)``; a TypeError if compiled for no CPU."""
    if not grad.size:
        return grad
    is_narrow = grad.dtype.itemsize < 4
    wide = _widened(grad)
    mean = _quotient(_sum(wide, axes), prod(grad.shape[a] for a in axes))
    if strength != 1.0:
        mean = _rounded(mean * strength)
    result = wide - mean
    return _kept(result.astype(grad.dtype)) if is_narrow else result


def fan_in_mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Mean over `axes`, which stay with size 1; a TypeError if compiled for no CPU."""
    return _quotient(_sum(_widened(x), axes), prod(x.shape[a] for a in axes))


def _widened(x: jax.Array) -> jax.Array:
    x = _only_on_cpu(x)
    return _rounded(_kept(x).astype(jnp.float32) if x.dtype.itemsize < 4 else x)


def _sum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sum over `axes`, which stay with size 1."""
    first, stop = axes[0], axes[0] + len(axes)
    moved = jnp.moveaxis(x, axes, range(first, stop))
    merged = moved.reshape(*moved.shape[:first], -1, *moved.shape[stop:])
    along = _sum_of_segments
    for _ in range(first):  # not by moving the axis: what is a view elsewhere is a copy here
        along = jax.vmap(along)
    return along(merged).reshape([1 if a in axes else size for a, size in enumerate(x.shape)])


def _sum_of_segments(x: jax.Array) -> jax.Array:
    """Sum over the first axis."""
    whole = len(x) - len(x) % SEGMENT
    sums: list[jax.Array] = []
    if whole:
        sums.extend(jax.vmap(halved)(x[:whole].reshape(-1, SEGMENT, *x.shape[1:])))
    if whole < len(x):
        sums.append(halved(x[whole:]))
    return reduce(add, sums)


def _quotient(x: jax.Array, divisor: int) -> jax.Array:
    return x / jnp.where(jnp.isnan(x), x, divisor)


def _rounded(x: jax.Array) -> jax.Array:
    """Return the numbers as they are, rounded even if they are products that are added up next."""
    return jnp.where(jnp.isnan(x), jnp.nan, x)


def _kept(x: jax.Array) -> jax.Array:
    """Return the array as it is; XLA works it out in its own dtype."""
    kept: jax.Array = jax.lax.optimization_barrier(x)  # type: ignore[no-untyped-call]
    return kept


def _only_on_cpu(x: jax.Array) -> jax.Array:
    same: jax.Array = _on_cpu.bind(x)  # type: ignore[no-untyped-call]
    return same


# Inside a program an array does not tell where it will be; the compiler knows.
_on_cpu = Primitive("gcx_reproducible")
_on_cpu.def_impl(lambda x: x)  # type: ignore[no-untyped-call]
_on_cpu.def_abstract_eval(lambda x: x)  # type: ignore[no-untyped-call]
batching.primitive_batchers[_on_cpu] = lambda args, axes: (_only_on_cpu(*args), axes[0])


def _refuse(context: Any, x: Any) -> Any:
    del x
    platforms = ", ".join(context.module_context.platforms)
    msg = f"reproducible=True is for JAX on a CPU, and this is compiled for {platforms}"
    raise TypeError(msg)


mlir.register_lowering(_on_cpu, _refuse)
mlir.register_lowering(_on_cpu, lambda _context, x: [x], platform="cpu")
