"""CuPy: lists of arrays, centralized in few launches of CUDA kernels, one for most models.

CuPy's own mean and subtraction serve other dtypes, ROCm, and fan-ins that are not a matrix in
memory. Everything runs on the array's device, on the current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache, lru_cache
from typing import Any, ClassVar

import cupy as cp

from gcx._memory import Memory, find_span, repeats_itself
from gcx.backends import _canonical, _numpy
from gcx.backends.cuda import launcher
from gcx.backends.cuda.drivers import Cupy
from gcx.backends.cuda.launcher import OLDEST_DEVICE, Launcher, Schedule, Traits
from gcx.backends.cuda.tables import ELEMENTS
from gcx.backends.cuda.walks import Axes, find_walk, is_dense

check_dtype = _numpy.check_dtype  # CuPy's dtypes are NumPy's


def is_writable(out: Any, _grad: Any, /) -> bool:
    return not repeats_itself(out.shape, out.strides, out.itemsize)


def find_memory(array: Any, /) -> Memory:
    return Memory(array.data.ptr, array.shape, array.strides, array.itemsize)


def check_reproducible(grad: Any, _axes: Sequence[int], /) -> None:
    _canonical.check_dtype(grad.dtype.name)
    if cp.cuda.runtime.is_hip:
        raise TypeError("reproducible=True on CuPy is not for ROCm")


def fan_in_mean(x: Any, axes: Axes, reproducible: bool, /) -> Any:
    with x.device:
        wide = x.astype(cp.float32) if x.dtype.itemsize < 4 else x
        if reproducible:
            return _canonical.fan_in_mean(wide, axes, cp)
        return cp.mean(wide, axis=axes, keepdims=True)


def centralize(
    grad: Any, axes: Axes, strength: float, out: Any | None, reproducible: bool = False, /
) -> Any:
    return centralize_many([grad], [axes], strength, [out], reproducible)[0]


def centralize_many(
    grads: Sequence[Any],
    axes: Sequence[Axes],
    strength: float,
    outs: Sequence[Any],
    reproducible: bool,
    /,
) -> list[Any]:
    each = zip(grads, axes, outs, strict=True)
    traits = tuple([_see(grad, fan_in, out, reproducible) for grad, fan_in, out in each])
    results = [*outs]
    for k, grad in enumerate(grads):
        if traits[k] and outs[k] is None:
            with grad.device:
                results[k] = cp.empty_like(grad)
    left: Sequence[int] = range(len(grads))
    if any(traits):
        addresses = [
            [array.data.ptr if seen else 0 for array, seen in zip(arrays, traits, strict=True)]
            for arrays in (grads, results)
        ]
        left = _schedule(traits).run(addresses, (strength, 0.0))
    for k in left:
        results[k] = _by_itself(grads[k], axes[k], strength, outs[k], reproducible)
    return results


def devices() -> list[str]:
    if not cp.is_available():
        return []
    return [f"cuda:{k}" for k in range(cp.cuda.runtime.getDeviceCount())]


def asarray(values: Any, dtype: str, device: str, /) -> Any:
    with cp.cuda.Device(int(device.removeprefix("cuda:"))):
        return cp.asarray(_numpy.asarray(values, dtype, "cpu"))


def to_numpy(array: Any, /) -> Any:
    return _numpy.to_numpy(cp.asnumpy(array))


def _by_itself(grad: Any, axes: Axes, strength: float, out: Any | None, reproducible: bool) -> Any:
    """Centralize an array whose strides, or those of `out`, do not suit the kernels."""
    with grad.device:
        if grad.size == 0 or why_no_kernels(grad):
            return _with_own_operations(grad, axes, strength, out, reproducible)
        rows: Axes = tuple(range(grad.ndim - len(axes), grad.ndim))
        copy = cp.moveaxis(grad, axes, rows).copy()
        traits = _see(copy, rows, copy, reproducible)
        if traits is None or _schedule((traits,)).run([[copy.data.ptr]] * 2, (strength, 0.0)):
            _with_own_operations(copy, rows, strength, copy, reproducible)
        out = cp.empty_like(grad) if out is None else out
        out[...] = cp.moveaxis(copy, rows, axes)
        return out


def _with_own_operations(
    grad: Any, axes: Axes, strength: float, out: Any | None, reproducible: bool
) -> Any:
    mean = fan_in_mean(grad, axes, reproducible) * strength
    if grad.dtype.itemsize >= 4:
        return cp.subtract(grad, mean, out=out)
    out = cp.empty_like(grad) if out is None else out
    out[...] = cp.subtract(grad, mean)
    return out


def why_no_kernels(grad: Any) -> str:
    """Say why the kernels do not take an array; empty if they do."""
    if grad.dtype.name not in ELEMENTS or not grad.dtype.isnative:
        return f"{grad.dtype}"
    if cp.cuda.runtime.is_hip:
        return "ROCm"
    device = grad.device.id
    if _Host().capability(device) < OLDEST_DEVICE:
        return "a GPU older than compute capability 8.0"
    found = _find_launcher()
    return found if isinstance(found, str) else found.failures.get(device, "")


class _Host:
    """See `gcx.backends.cuda.launcher.Host`."""

    _of_graphs: ClassVar[list[Any]] = []  # memory that lives as long as the process
    out_of_memory = cp.cuda.memory.OutOfMemoryError

    def current(self, device: int) -> AbstractContextManager[object]:
        return cp.cuda.Device(device)  # type: ignore[no-any-return]

    def capability(self, device: int) -> tuple[int, int]:
        digits = cp.cuda.Device(device).compute_capability
        return int(digits[:-1]), int(digits[-1])

    def stream(self, _device: int) -> int:
        return cp.cuda.get_current_stream().ptr  # type: ignore[no-any-return]

    def is_capturing(self) -> bool:
        return bool(cp.cuda.get_current_stream().is_capturing())

    def allocate(self, _device: int, size: int) -> tuple[int, object]:
        memory = cp.cuda.alloc(size)
        if self.is_capturing():  # each replay writes there, and CuPy does not know it
            self._of_graphs.append(memory)
        return memory.ptr, memory


@cache
def _find_launcher() -> Launcher | str:
    return launcher.find_launcher(Cupy, _Host())


@lru_cache(maxsize=1 << 8)
def _schedule(arrays: tuple[Traits | None, ...]) -> Schedule:
    found = _find_launcher()
    assert isinstance(found, Launcher)  # `_see` has asked
    return Schedule(found, "Store", arrays)


def _see(grad: Any, axes: Axes, out: Any | None, reproducible: bool) -> Traits | None:
    """See an array as the kernels do; None if they do not take it, or its `out`."""
    shape, strides, itemsize = grad.shape, grad.strides, grad.dtype.itemsize
    if why_no_kernels(grad) or any(stride % itemsize for stride in strides):
        return None
    steps = tuple([stride // itemsize for stride in strides])
    # A new result has the strides of the array only if the array is dense.
    if not (is_dense(shape, steps) if out is None else out.strides == strides):
        return None
    if out is not None and out is not grad:
        start, end = find_span(find_memory(grad))
        if 0 < abs(out.data.ptr - grad.data.ptr) < end - start:
            return None
    walk = find_walk(shape, steps, axes, any_order=not reproducible)
    return walk and (grad.device.id, grad.dtype.name, walk)
