"""JAX: one jitted expression, which XLA fuses into the caller's own program."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from math import prod
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from gcx._memory import Memory
from gcx.backends import _canonical, one_by_one, refuse_dtype

_SMALL = 1 << 13  # elements of an array that XLA on a CPU may add one by one
_SHORT = 1 << 5  # elements of a fan-in that can be added one by one: an error of 8 ulp at most


def check_dtype(grad: jax.Array, /) -> None:
    if not is_floating(grad.dtype):
        refuse_dtype(grad.dtype)


def is_floating(dtype: Any, /) -> bool:
    """Return True if a real or complex dtype can hold a gradient."""
    # float8_e8m0fnu is a scale: it has no sign and no zero.
    return bool(jnp.issubdtype(dtype, jnp.inexact)) and "e8m0" not in jnp.dtype(dtype).name


def is_writable(_out: jax.Array, _grad: jax.Array, /) -> bool:
    return False


def find_memory(array: jax.Array, /) -> Memory:
    return Memory(id(array))


def check_reproducible(grad: jax.Array, axes: Sequence[int], /) -> None:
    """Check the dtype, and the device; a traced array is checked when the program is compiled."""
    _canonical.check_dtype(grad.dtype.name)
    if not all(isinstance(grad.shape[axis], int) for axis in axes):
        raise TypeError(
            f"reproducible=True needs a fan-in of known size, not axes {axes} of {grad.shape}"
        )
    if isinstance(grad, jax.core.Tracer):
        return
    others = {device.platform for device in grad.devices()} - {"cpu"}
    if others:
        raise TypeError(
            f"reproducible=True is for JAX on a CPU, and this array is on {', '.join(others)}"
        )


def fan_in_mean(x: jax.Array, axes: tuple[int, ...], reproducible: bool, /) -> Any:
    return _mean_in_order(x, axes) if reproducible else _mean(x, axes)


def centralize(
    grad: jax.Array, axes: tuple[int, ...], strength: float, _out: None, reproducible: bool, /
) -> Any:
    return (
        _centralize_in_order(grad, strength, axes) if reproducible else _run(grad, axes, strength)
    )


centralize_many = one_by_one(centralize)


def centralize_over_mesh(
    grad: jax.Array, axes: tuple[int, ...], strength: float, axis_names: tuple[str, ...], /
) -> Any:
    """Centralize one shard of a gradient; mesh axes split its fan-in into equal parts.

    JAX raises a NameError where no `jax.shard_map`, `jax.pmap` or `jax.vmap` binds their names.
    """
    axis_names = tuple([axis for axis in axis_names if not _is_same_along(grad, axis)])
    fan_in = _count(grad, axes, axis_names)
    if isinstance(fan_in, int) and fan_in < 2:  # the mean of one element is the element
        return grad
    return _run(grad, axes, strength, axis_names)


def _count(grad: jax.Array, axes: tuple[int, ...], axis_names: tuple[str, ...]) -> Any:
    """Count the elements of a fan-in; in a JAX export the number may be a symbol."""
    return jax.lax.psum(1, axis_names) * prod(grad.shape[a] for a in axes)  # type: ignore[no-untyped-call]


def _is_same_along(grad: jax.Array, axis: str) -> bool:
    # The index differs along its axis. If JAX does not know this, it tracks nothing here.
    return axis in varying_axes(jax.lax.axis_index(axis)) and axis not in varying_axes(grad)


def varying_axes(grad: jax.Array, /) -> frozenset[str]:
    """Find the mesh axes along which JAX, in a checked `jax.shard_map`, lets an array vary."""
    aval: Any = getattr(grad, "aval", None)
    if hasattr(aval, "manual_axis_type"):  # since 0.10
        return frozenset(aval.manual_axis_type.varying)
    return frozenset(getattr(aval, "vma", ()))


def devices() -> list[str]:
    return [str(device) for device in _devices()]


def asarray(values: Any, dtype: str, device: str, /) -> Any:
    found = next(d for d in _devices() if str(d) == device)
    return jax.device_put(np.asarray(values).astype(jnp.dtype(dtype)), found)


def to_numpy(array: jax.Array, /) -> Any:
    return np.asarray(array).astype(_working_dtype(array.dtype))


def _run(
    grad: jax.Array, axes: tuple[int, ...], strength: float, axis_names: tuple[str, ...] = ()
) -> Any:
    # Outside of a program the call is one itself. Without the barrier XLA makes one kernel of it.
    in_program = isinstance(grad, jax.core.Tracer)
    part = None if strength == 1.0 else strength  # an operand: one program for every strength
    return _centralize(grad, part, axes, axis_names, in_program)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _centralize(
    grad: jax.Array,
    strength: float | None,
    axes: tuple[int, ...],
    axis_names: tuple[str, ...],
    in_program: bool,
) -> jax.Array:
    wide = grad.astype(_working_dtype(grad.dtype))
    mean = _average(wide, axes)
    fan_in = _count(grad, axes, axis_names)
    if not isinstance(fan_in, int):  # a symbol, which may be 1 in a call
        mean = jnp.where(jnp.asarray(fan_in) > 1, mean, 0)
    if axis_names:
        mean = jax.lax.pmean(mean, axis_names)  # type: ignore[no-untyped-call]
    if in_program:
        # Otherwise XLA on a GPU computes the mean again in each kernel that uses the result. Adam
        # has two such kernels, and each would read the whole gradient for it.
        mean = jax.lax.optimization_barrier(mean)  # type: ignore[no-untyped-call]
    if strength is not None:
        mean = strength * mean
    return (wide - mean).astype(grad.dtype)


@partial(jax.jit, static_argnums=1)
def _mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return _average(x.astype(_working_dtype(x.dtype)), axes)


def _average(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Average over `axes`, the longest run of neighbours first.

    XLA on a CPU adds numbers one by one, and rounds each time, over several runs and in small
    arrays; there the mean of the remainder corrects the error. It adds complex numbers one by one
    everywhere, so their parts are averaged apart.
    """
    if jnp.iscomplexobj(x):
        return jax.lax.complex(_average(x.real, axes), _average(x.imag, axes))
    sizes = [size if isinstance(size, int) else _SMALL + 1 for size in x.shape]  # some are symbols
    runs: list[tuple[int, ...]] = []
    for axis in axes:
        if runs and runs[-1][-1] == axis - 1:
            runs[-1] += (axis,)
        else:
            runs.append((axis,))
    runs.sort(key=lambda run: -prod(sizes[axis] for axis in run))

    def average(x: jax.Array) -> jax.Array:
        for run in runs:
            x = jnp.mean(x, axis=run, keepdims=True)
        return x

    mean = average(x)
    if prod(sizes) > _SMALL or prod(sizes[axis] for axis in axes) <= _SHORT:
        return mean
    corrected: jax.Array = jax.lax.platform_dependent(
        x, mean, cpu=lambda x, mean: mean + average(x - mean), default=lambda _, mean: mean
    )
    return corrected


def _working_dtype(dtype: Any) -> Any:
    return jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype


def _devices() -> list[jax.Device]:
    accelerated = jax.devices()
    return accelerated if accelerated[0].platform == "cpu" else [*jax.devices("cpu"), *accelerated]


# --- the canonical order, on a CPU, protected from the rewriting of XLA ---


def _subtract_mean_in_order(
    grad: jax.Array, strength: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    """Compute ``grad - strength * mean(grad, axes)``."""
    if not grad.size:
        return grad
    wide = _widen(grad)
    mean = _average_in_order(wide, axes)
    result = wide - _round(mean * jnp.asarray(strength, mean.dtype))
    return _keep_dtype(result.astype(grad.dtype)) if grad.dtype.itemsize < 4 else result


# Of a gradient and a strength: a linear operator on the first, which equals its own transpose; JAX
# cannot see it in the additions.
_in_order = Primitive("gcx_centralize")
_in_order.def_abstract_eval(lambda x, *_, **__: x)  # type: ignore[no-untyped-call]
_in_order.def_impl(jax.jit(_subtract_mean_in_order, static_argnames="axes"))  # type: ignore[no-untyped-call]
ad.deflinear2(_in_order, lambda ct, _, part, **how: [_in_order.bind(ct, part, **how), None])  # type: ignore[no-untyped-call]
ad.primitive_jvps[_in_order] = lambda primals, tangents, **how: (
    _in_order.bind(*primals, **how),  # type: ignore[no-untyped-call]
    _in_order.bind(tangents[0], primals[1], **how),  # type: ignore[no-untyped-call]
)
mlir.register_lowering(_in_order, mlir.lower_fun(_subtract_mean_in_order, multiple_results=False))
batching.primitive_batchers[_in_order] = lambda args, dims, axes: (
    _in_order.bind(*args, axes=tuple([a + (a >= dims[0]) for a in axes])),  # type: ignore[no-untyped-call]
    dims[0],
)
_centralize_in_order = jax.jit(
    lambda grad, strength, axes: _in_order.bind(grad, strength, axes=axes),  # type: ignore[no-untyped-call]
    static_argnums=2,
)


@partial(jax.jit, static_argnums=1)
def _mean_in_order(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return _average_in_order(_widen(x), axes)


def _widen(x: jax.Array) -> jax.Array:
    """Return an array of 32 bits or more; compiling it for a GPU is a TypeError."""
    x = _on_cpu.bind(x)  # type: ignore[no-untyped-call]
    return _round(_keep_dtype(x).astype(jnp.float32) if x.dtype.itemsize < 4 else x)


def _average_in_order(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Average over `axes`, which stay with size 1."""
    first, stop = axes[0], axes[0] + len(axes)
    moved = jnp.moveaxis(x, axes, range(first, stop))
    merged = moved.reshape(*moved.shape[:first], -1, *moved.shape[stop:])
    along = _sum_segments
    for _ in range(first):  # moving the axis would copy the array in JAX
        along = jax.vmap(along)
    total = along(merged).reshape([1 if a in axes else size for a, size in enumerate(x.shape)])
    # XLA would multiply by the reciprocal of a constant.
    return total / jnp.where(jnp.isnan(total), total, merged.shape[first])


def _sum_segments(x: jax.Array) -> jax.Array:
    """Sum over the first axis."""
    whole = len(x) - len(x) % _canonical.SEGMENT
    sums: list[jax.Array] = []
    if whole:
        segments = x[:whole].reshape(-1, _canonical.SEGMENT, *x.shape[1:])
        sums.extend(jax.vmap(_canonical.halve)(segments))
    if whole < len(x):
        sums.append(_canonical.halve(x[whole:]))
    return reduce(add, sums)


def _round(x: jax.Array) -> jax.Array:
    """Return the numbers unchanged; LLVM would fuse a product with the next sum, unrounded."""
    return jnp.where(jnp.isnan(x), jnp.nan, x)


def _keep_dtype(x: jax.Array) -> Any:
    """Return the array unchanged; XLA would drop a conversion to a narrow dtype and back."""
    return jax.lax.optimization_barrier(x)  # type: ignore[no-untyped-call]


# A traced array has no device yet; the compiler knows the platform.
_on_cpu = Primitive("gcx_reproducible")
_on_cpu.def_impl(lambda x: x)  # type: ignore[no-untyped-call]
_on_cpu.def_abstract_eval(lambda x: x)  # type: ignore[no-untyped-call]
batching.primitive_batchers[_on_cpu] = lambda args, axes: (_on_cpu.bind(*args), axes[0])  # type: ignore[no-untyped-call]


def _refuse(context: Any, _x: Any) -> Any:
    platforms = ", ".join(context.module_context.platforms)
    raise TypeError(f"reproducible=True is for JAX on a CPU, and this is compiled for {platforms}")


mlir.register_lowering(_on_cpu, _refuse)
mlir.register_lowering(_on_cpu, lambda _context, x: [x], platform="cpu")
