"""CuPy: lists of arrays, centralized in one launch of a CUDA kernel for each dtype.

What the kernel does not take (other dtypes, ROCm, what is captured for a CUDA graph), CuPy's own
mean and subtraction do. All is done on the device of the array, on the current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import cupy as cp
import numpy as np

from gcx.backends import _canonical, _cupy_kernels, _numpy
from gcx.backends._cupy_kernels import ARRAYS, MOST, Axes, Batch, Walk, launch
from gcx.backends._matrices import matrices

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
    plan = _plan(tuple(map(_form, grads, axes, outs)), reproducible)
    if _interfere(grads, outs, plan.uses):
        do = centralize if len(grads) > 1 else _by_itself
        return [
            do(grad, fan_in, strength, out, reproducible)
            for grad, fan_in, out in zip(grads, axes, outs, strict=True)
        ]
    results = list(outs)
    left = [*plan.left]
    for places, batch in plan.batches:
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
    """Centralize an array that the kernel cannot walk through as it is, or not into `out`."""
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
    """Tell what it is about an array that the kernel is not for; nothing if it takes it."""
    if dtype.name not in _cupy_kernels.ELEMENTS or not dtype.isnative:
        return f"{dtype}"
    if cp.cuda.runtime.is_hip:
        return "ROCm"
    fan_in, size = prod(shape[axis] for axis in axes), prod(shape)
    return f"an array of shape {shape}" if max(fan_in, size // fan_in) > MOST else ""


def _why_not_now() -> str:
    """Tell what it is about the current stream."""
    # A graph would replay addresses of tables that are free by then.
    is_captured = cp.cuda.get_current_stream().is_capturing()
    return "a stream that is captured for a CUDA graph" if is_captured else ""


class _Form(NamedTuple):
    """What decides how an array is centralized; `out` has the strides of the other one, if any."""

    shape: Axes
    strides: Axes
    dtype: Any
    device: int
    axes: Axes
    out: Axes | None
    in_place: bool


class _Uses(NamedTuple):
    """Arrays that are read or written: places in gradients and `outs`, where they begin and end."""

    places: list[int]
    low: Any
    high: Any
    is_written: Any


class _Plan(NamedTuple):
    """How a list of arrays is centralized, by place in the list."""

    batches: list[tuple[list[int], Batch]]
    left: list[int]
    uses: _Uses


def _form(grad: Any, axes: Axes, out: Any | None) -> _Form:
    strides = None if out is None else out.strides
    return _Form(grad.shape, grad.strides, grad.dtype, grad.device.id, axes, strides, out is grad)


@lru_cache(maxsize=1 << 8)
def _plan(forms: tuple[_Form, ...], reproducible: bool) -> _Plan:
    left = []
    alike: dict[object, list[tuple[int, Walk]]] = {}
    for k, form in enumerate(forms):
        found = _walk(form, reproducible)
        if found is None:
            left.append(k)
        else:
            alike.setdefault((form.device, form.dtype), []).append((k, found))
    batches = []
    for walks in alike.values():
        for start in range(0, len(walks), ARRAYS):
            places, some = zip(*walks[start : start + ARRAYS], strict=True)
            batches.append(([*places], Batch(forms[places[0]].dtype, some)))
    return _Plan(batches, left, _uses(forms))


def _walk(form: _Form, reproducible: bool) -> Walk | None:
    """How the kernel walks through an array and `out` together, if it does."""
    shape, strides, dtype, _, axes, out, _ = form
    if 0 in shape or _why_not(shape, dtype, axes):
        return None
    if out != strides and not (out is None and _is_dense(shape, strides, dtype.itemsize)):
        return None
    if any(stride % dtype.itemsize for stride in strides):
        return None
    steps = [stride // dtype.itemsize for stride in strides]
    return matrices(shape, steps, axes, any_order=not reproducible)


def _is_dense(shape: Axes, strides: Axes, itemsize: int) -> bool:
    """Whether `cp.empty_like` gives an array of the same strides."""
    step = itemsize
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != step:
                return False
            step *= size
    return True


def _uses(forms: Sequence[_Form]) -> _Uses:
    rows = [
        (place, *_reach(form.shape, strides, form.dtype.itemsize), is_written)
        for k, form in enumerate(forms)
        for place, strides, is_written in (
            (k, form.strides, form.in_place),
            (k + len(forms), None if form.in_place else form.out, True),
        )
        if strides is not None and 0 not in form.shape
    ]
    places, *columns = zip(*rows, strict=True) if rows else ((), (), (), ())
    return _Uses([*places], *(np.array(column) for column in columns))


def _reach(shape: Axes, strides: Axes, itemsize: int) -> tuple[int, int]:
    """Where an array begins and ends, counted in bytes from its first element."""
    reaches = [stride * (size - 1) for size, stride in zip(shape, strides, strict=True)]
    return sum(min(reach, 0) for reach in reaches), sum(max(r, 0) for r in reaches) + itemsize


def _interfere(grads: Sequence[Any], outs: Sequence[Any], uses: _Uses) -> bool:
    """Whether something is written to memory where another array lies, or may lie."""
    if len(uses.places) < 2 or not uses.is_written.any():
        return False
    arrays = [*grads, *outs]
    starts = np.array([arrays[place].data.ptr for place in uses.places])
    order = np.argsort(starts + uses.low)
    begins, ends = (starts + uses.low)[order], (starts + uses.high)[order]
    is_written = uses.is_written[order]
    end_so_far = np.maximum.accumulate(ends)[:-1]
    end_of_written = np.maximum.accumulate(np.where(is_written, ends, 0))[:-1]
    return bool((begins[1:] < np.where(is_written[1:], end_so_far, end_of_written)).any())
