"""CuPy: lists of arrays, centralized in one launch of a CUDA kernel for each dtype.

CuPy's own mean and subtraction serve other dtypes, ROCm, and streams that are captured for a CUDA
graph. Everything runs on the array's device, on the current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import cupy as cp

from gcx.backends import _canonical, _cupy_kernels, _numpy
from gcx.backends._cupy_kernels import ARRAYS, MOST, Axes, Batch, Walk, launch
from gcx.backends._matrices import matrices
from gcx.backends._memory import extent, is_dense, writes_conflict

check_dtype = _numpy.check_dtype  # CuPy's dtypes are NumPy's


def is_writable(array: Any, /) -> bool:
    """See `gcx.backends.Backend`."""
    axes = zip(array.shape, array.strides, strict=True)
    return not any(size > 1 and stride == 0 for size, stride in axes)


def check_reproducible(grad: Any, axes: Sequence[int], /) -> None:
    """See `gcx.backends.Backend`."""
    _canonical.check_dtype(grad.dtype.name)
    with grad.device:
        why_not = _why_not(grad.shape, grad.dtype, tuple(axes)) or _why_not_now()
    if why_not:
        msg = f"reproducible=True on CuPy is not for {why_not}"
        raise TypeError(msg)


def reshape(array: Any, shape: Axes, /) -> Any:
    """See `gcx.backends.Backend`."""
    return array.reshape(shape)


def fan_in_mean(x: Any, axes: Axes, reproducible: bool, /) -> Any:
    """See `gcx.backends.Backend`."""
    with x.device:
        wide = x.astype(cp.float32) if x.dtype.itemsize < 4 else x
        if reproducible:
            return _canonical.fan_in_mean(wide, axes, cp)
        return cp.mean(wide, axis=axes, keepdims=True)


def centralize(
    grad: Any, axes: Axes, strength: float, out: Any | None, reproducible: bool = False, /
) -> Any:
    """See `gcx.backends.Backend`."""
    return centralize_many([grad], [axes], strength, [out], reproducible)[0]


def centralize_many(
    grads: Sequence[Any],
    axes: Sequence[Axes],
    strength: float,
    outs: Sequence[Any],
    reproducible: bool,
    /,
) -> list[Any]:
    """See `gcx.backends.Backend`."""
    if writes_conflict(grads, outs, _find_span):  # then in the order of the list
        do = centralize if len(grads) > 1 else _by_itself
        return [
            do(grad, fan_in, strength, out, reproducible)
            for grad, fan_in, out in zip(grads, axes, outs, strict=True)
        ]
    schedule = _schedule(tuple(map(_describe, grads, axes, outs)), reproducible)
    results = list(outs)
    left = [*schedule.left]
    for places, batch in schedule.batches:
        with grads[places[0]].device:
            if _why_not_now():
                left += places
                continue
            for k in places:
                if outs[k] is None:
                    results[k] = cp.empty_like(grads[k])
            launch(batch, [grads[k] for k in places], [results[k] for k in places], strength)
    for k in left:
        results[k] = _by_itself(grads[k], axes[k], strength, outs[k], reproducible)
    return results


def devices() -> list[str]:
    """See `gcx.backends.Backend`."""
    if not cp.is_available():
        return []
    return [f"cuda:{k}" for k in range(cp.cuda.runtime.getDeviceCount())]


def asarray(values: Any, dtype: str, device: str, /) -> Any:
    """See `gcx.backends.Backend`."""
    with cp.cuda.Device(int(device.removeprefix("cuda:"))):
        return cp.asarray(_numpy.asarray(values, dtype, "cpu"))


def to_numpy(array: Any, /) -> Any:
    """See `gcx.backends.Backend`."""
    return _numpy.to_numpy(cp.asnumpy(array))


def _by_itself(grad: Any, axes: Axes, strength: float, out: Any | None, reproducible: bool) -> Any:
    """Centralize an array if its strides, or the strides of `out`, do not suit the kernel."""
    with grad.device:
        if grad.size == 0 or _why_not(grad.shape, grad.dtype, axes) or _why_not_now():
            return _with_own_operations(grad, axes, strength, out)
        last = tuple(range(grad.ndim - len(axes), grad.ndim))
        rows = cp.moveaxis(grad, axes, last).copy()
        centralize(rows, last, strength, rows, reproducible)
        if out is None:
            out = cp.empty_like(grad)
        out[...] = cp.moveaxis(rows, last, axes)
        return out


def _with_own_operations(grad: Any, axes: Axes, strength: float, out: Any | None) -> Any:
    is_narrow = grad.dtype.itemsize < 4
    wide = grad.astype(cp.float32) if is_narrow else grad
    mean = cp.mean(wide, axis=axes, keepdims=True) * strength
    if not is_narrow:
        return cp.subtract(wide, mean, out=out)
    if out is None:
        out = cp.empty_like(grad)
    out[...] = cp.subtract(wide, mean, out=wide)
    return out


def _why_not(shape: Axes, dtype: Any, axes: Axes) -> str:
    """Name the property of an array that the kernel does not support; empty if it takes it."""
    if dtype.name not in _cupy_kernels.ELEMENTS or not dtype.isnative:
        return f"{dtype}"
    if cp.cuda.runtime.is_hip:
        return "ROCm"
    fan_in, size = prod(shape[axis] for axis in axes), prod(shape)
    return f"an array of shape {shape}" if max(fan_in, size // fan_in) > MOST else ""


def _why_not_now() -> str:
    """Say why the kernel cannot run on the current stream; empty if it can."""
    # A replayed graph would read tables that have been freed since.
    is_captured = cp.cuda.get_current_stream().is_capturing()
    return "a stream that is captured for a CUDA graph" if is_captured else ""


class _Traits(NamedTuple):
    """Everything that decides how an array is centralized."""

    shape: Axes
    strides: Axes
    dtype: Any
    device: int
    axes: Axes
    out_strides: Axes | None


class _Schedule(NamedTuple):
    """Batches for the kernel and the arrays left to CuPy, by position in a list of arrays."""

    batches: list[tuple[list[int], Batch]]
    left: list[int]


def _describe(grad: Any, axes: Axes, out: Any | None) -> _Traits:
    out_strides = None if out is None else out.strides
    return _Traits(grad.shape, grad.strides, grad.dtype, grad.device.id, axes, out_strides)


@lru_cache(maxsize=1 << 8)
def _schedule(arrays: tuple[_Traits, ...], reproducible: bool) -> _Schedule:
    left = []
    alike: dict[object, list[tuple[int, Walk]]] = {}
    for k, traits in enumerate(arrays):
        found = _find_walk(traits, reproducible)
        if found is None:
            left.append(k)
        else:
            alike.setdefault((traits.device, traits.dtype), []).append((k, found))
    batches = []
    for walks in alike.values():
        for start in range(0, len(walks), ARRAYS):
            places, some = zip(*walks[start : start + ARRAYS], strict=True)
            batches.append(([*places], Batch(arrays[places[0]].dtype, some)))
    return _Schedule(batches, left)


def _find_walk(traits: _Traits, reproducible: bool) -> Walk | None:
    """Find the matrices of an array and its result; None if the kernel cannot walk through them."""
    shape, strides, dtype, _, axes, out_strides = traits
    if 0 in shape or _why_not(shape, dtype, axes):
        return None
    if any(stride % dtype.itemsize for stride in strides):
        return None
    steps = [stride // dtype.itemsize for stride in strides]
    # A new result gets the strides of the array only if the array is dense.
    if out_strides != strides and not (out_strides is None and is_dense(shape, steps)):
        return None
    return matrices(shape, steps, axes, any_order=not reproducible)


def _find_span(array: Any) -> tuple[int, int]:
    first, end = extent(array.shape, array.strides, array.dtype.itemsize)
    return array.data.ptr + first, array.data.ptr + end
