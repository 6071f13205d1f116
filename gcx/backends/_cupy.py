"""CuPy: lists of arrays, centralized in one launch of a CUDA kernel for each dtype.

What the kernel does not take (other dtypes, ROCm, what is captured for a CUDA graph), CuPy's own
mean and subtraction do. All is done on the device of the array, on the current stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import cupy as cp

from gcx.backends import _canonical, _cupy_kernels, _numpy
from gcx.backends._cupy_kernels import ARRAYS, MOST, Axes

check_dtype = _numpy.check_dtype  # CuPy's dtypes are NumPy's


def is_writable(array: Any, /) -> bool:
    """See `gcx.backends.Backend`."""
    axes = zip(array.shape, array.strides, strict=True)
    return not any(size > 1 and stride == 0 for size, stride in axes)


def check_reproducible(grad: Any, axes: Sequence[int], /) -> None:
    """See `gcx.backends.Backend`."""
    _canonical.check_dtype(grad.dtype.name)
    why_not = _why_not(grad, tuple(axes))
    if why_not:
        msg = f"reproducible=True on CuPy is not for {why_not}"
        raise TypeError(msg)


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
    arrays = list(zip(grads, axes, outs, strict=True))
    if len(arrays) > 1 and _interfere(grads, outs):  # then one after the other
        return [centralize(*array[:2], strength, array[2], reproducible) for array in arrays]
    results = []
    batches: dict[object, list[_Job]] = {}
    for grad, fan_in, out in arrays:
        with grad.device:
            if grad.size == 0 or _why_not(grad, fan_in):
                results.append(_with_own_operations(grad, fan_in, strength, out))
                continue
            job = _job(grad, fan_in, cp.empty_like(grad) if out is None else out, reproducible)
        results.append(job.out)
        batches.setdefault((grad.device.id, grad.dtype.name), []).append(job)
    for jobs in batches.values():
        for start in range(0, len(jobs), ARRAYS):
            _run(jobs[start : start + ARRAYS], strength, reproducible)
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


class _Job(NamedTuple):
    """The kernel reads `source` and writes `target`, whose strides are the same.

    That is `out`, or else holds what goes to `out`, where the fan-in axes are `fan_in`.
    """

    source: Any
    target: Any
    axes: Axes
    out: Any
    fan_in: Axes


def _job(grad: Any, fan_in: Axes, out: Any, reproducible: bool) -> _Job:
    fits = _cupy_kernels.walks(grad, fan_in, any_order=not reproducible)
    if fits and (out is grad or _is_beside(grad, out)):
        return _Job(grad, out, fan_in, out, fan_in)
    last = tuple(range(-len(fan_in), 0))
    rows = cp.moveaxis(grad, fan_in, last).copy()
    return _Job(rows, rows, tuple(axis + rows.ndim for axis in last), out, fan_in)


def _run(jobs: Sequence[_Job], strength: float, reproducible: bool) -> None:
    """Centralize arrays of one dtype on one device."""
    sources, targets, axes, outs, fan_ins = zip(*jobs, strict=True)
    with sources[0].device:
        _cupy_kernels.launch(sources, axes, strength, targets, any_order=not reproducible)
        for target, walked, out, fan_in in zip(targets, axes, outs, fan_ins, strict=True):
            if target is not out:
                out[...] = cp.moveaxis(target, walked, fan_in)


def _why_not(grad: Any, axes: Axes) -> str:
    """Tell for what the kernel is not; the answer is empty if it takes the array."""
    if grad.dtype.name not in _cupy_kernels.ELEMENTS or not grad.dtype.isnative:
        return f"{grad.dtype}"
    if cp.cuda.runtime.is_hip:
        return "ROCm"
    # A graph would replay addresses of tables that are free by then.
    if cp.cuda.get_current_stream().is_capturing():
        return "a stream that is captured for a CUDA graph"
    fan_in = prod(grad.shape[axis] for axis in axes)
    return f"an array of shape {grad.shape}" if max(fan_in, grad.size // fan_in) > MOST else ""


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


def _is_beside(grad: Any, out: Any) -> bool:
    """Whether `out` can be written to element by element while `grad` is read."""
    if out.strides != grad.strides:
        return False
    (low, high), (other_low, other_high) = _span(grad), _span(out)
    return low == other_low or high <= other_low or other_high <= low


def _interfere(grads: Sequence[Any], outs: Sequence[Any]) -> bool:
    """Whether something is written to memory where another array lies, or may lie."""
    end = end_of_written = 0
    for low, high, is_written in sorted(_uses(grads, outs)):
        if low < (end if is_written else end_of_written):
            return True
        end = max(end, high)
        end_of_written = max(end_of_written, high) if is_written else end_of_written
    return False


def _uses(grads: Sequence[Any], outs: Sequence[Any]) -> Iterator[tuple[int, int, bool]]:
    """Where arrays begin and end, and whether they are written to; new ones lie apart."""
    for grad, out in zip(grads, outs, strict=True):
        yield *_span(grad), out is grad
        if out is not None and out is not grad:
            yield *_span(out), True


def _span(array: Any) -> tuple[int, int]:
    """Where an array begins and ends in memory."""
    start = array.data.ptr
    if array.size == 0:
        return start, start
    reaches = [stride * (size - 1) for size, stride in zip(array.shape, array.strides, strict=True)]
    low, high = (sum(limit(reach, 0) for reach in reaches) for limit in (min, max))
    return start + low, start + high + array.itemsize
