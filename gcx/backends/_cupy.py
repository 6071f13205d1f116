"""CuPy: lists of arrays, centralized in few launches of CUDA kernels, one for most models.

CuPy's own mean and subtraction serve other dtypes, ROCm, and fan-ins that are not a matrix in
memory. Everything runs on the array's device, on the current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, ClassVar

import cupy as cp

from gcx._memory import Memory, find_span, repeats_itself
from gcx.backends import _canonical, _numpy
from gcx.backends.cuda import launcher
from gcx.backends.cuda.launcher import KERNEL, OLDEST_DEVICE, Launcher, Schedule, Traits
from gcx.backends.cuda.tables import ELEMENTS, Axes, find_walk, is_dense

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
        if outs[k] is None:
            with grad.device:
                results[k] = cp.empty_like(grad)
    left: Sequence[int] = range(len(grads))
    if any(traits):
        addresses = [[array.data.ptr for array in arrays] for arrays in (grads, results)]
        left = _schedule(traits).run(addresses, (strength, 0.0))
    for k in left:
        with grads[k].device:
            mean = fan_in_mean(grads[k], axes[k], reproducible) * strength
            if mean.dtype == grads[k].dtype:
                cp.subtract(grads[k], mean, out=results[k])
            else:
                results[k][...] = cp.subtract(grads[k], mean)
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


def why_no_kernels(grad: Any) -> str:
    """Say why the kernels do not take an array; empty if they do."""
    if grad.dtype.name not in ELEMENTS or not grad.dtype.isnative:
        return f"{grad.dtype}"
    if cp.cuda.runtime.is_hip:
        return "ROCm"
    device = grad.device.id
    if _capability(device) < OLDEST_DEVICE:
        return "a GPU older than compute capability 8.0"
    found = _find_launcher()
    return found if isinstance(found, str) else found.failures.get(device, "")


def _capability(device: int) -> tuple[int, int]:
    digits = cp.cuda.Device(device).compute_capability
    return int(digits[:-1]), int(digits[-1])


class Driver:
    """CuPy's own modules; see `gcx.backends.cuda.launcher._Host`."""

    _of_graphs: ClassVar[list[Any]] = []  # memory that lives as long as the process
    capability = staticmethod(_capability)
    current = cp.cuda.Device

    def __init__(self) -> None:
        from cupy.cuda import driver, nvrtc, runtime

        self._driver, self._nvrtc, self._runtime = driver, nvrtc, runtime

    def versions(self) -> tuple[int, int]:
        major, minor = self._nvrtc.getVersion()
        return 1000 * major + 10 * minor, self._runtime.driverGetVersion()

    def compile(self, source: str, options: Sequence[str], /) -> bytes:
        nvrtc = self._nvrtc
        program = nvrtc.createProgram(source, "kernels.cu", (), ())
        try:
            nvrtc.compileProgram(program, tuple(options))
            code: bytes = nvrtc.getCUBIN(program)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(f"{error}: {nvrtc.getProgramLog(program)}") from error
        finally:
            nvrtc.destroyProgram(program)
        return code

    def load(self, device: int, code: bytes, /) -> Any:
        self._runtime.setDevice(device)
        module = self._driver.moduleLoadData(code)  # for as long as the process lives
        return self._driver.moduleGetFunction(module, KERNEL)

    def launch(self, device: int, kernel: Any, arguments: tuple[int, ...], /) -> None:
        self._runtime.setDevice(device)  # makes its context current in this thread
        self._driver.launchKernel(kernel, *arguments)

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
    return launcher.find_launcher(Driver)


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
