"""NVRTC and the CUDA driver, by the package that comes with the arrays' library.

Devices are used by their number. The caller has made a device current.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

_NAME = "gcx_kernel"  # of every kernel


class Driver(Protocol):
    """The compiler and the driver. Each error is an exception with the driver's own name for it."""

    def versions(self) -> tuple[int, int]:
        """Return the versions of NVRTC and of the driver, such as 12010 for 12.1."""

    def compile(self, source: str, options: Sequence[str], /) -> bytes:
        """Compile a kernel for one architecture."""

    def load(self, device: int, code: bytes, /) -> Any:
        """Load a compiled kernel on the current device."""

    def launch(self, device: int, kernel: Any, arguments: tuple[int, ...], /) -> None:
        """Launch a kernel on the current device, with the further arguments of cuLaunchKernel."""


class Bindings:
    """The driver through cuda.bindings, on which torch's CUDA builds depend."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver, nvrtc
        except ImportError as error:
            raise ImportError(f"{error} (pip install cuda-bindings)") from error
        self._driver, self._nvrtc = driver, nvrtc
        self._launch = driver.cuLaunchKernel

    def versions(self) -> tuple[int, int]:
        """See `Driver`."""
        major, minor = self._ask(self._nvrtc.nvrtcVersion)
        return 1000 * major + 10 * minor, self._ask(self._driver.cuDriverGetVersion)

    def compile(self, source: str, options: Sequence[str], /) -> bytes:
        """See `Driver`."""
        nvrtc = self._nvrtc
        program = self._ask(nvrtc.nvrtcCreateProgram, source.encode(), b"kernels.cu", 0, [], [])
        try:
            flags = [option.encode() for option in options]
            (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
            if int(status):
                log = bytes(self._ask(nvrtc.nvrtcGetProgramLogSize, program))
                self._ask(nvrtc.nvrtcGetProgramLog, program, log)
                raise RuntimeError(f"{status.name}: {log.decode(errors='replace')}".strip("\0\n "))
            code = bytes(self._ask(nvrtc.nvrtcGetCUBINSize, program))
            self._ask(nvrtc.nvrtcGetCUBIN, program, code)
        finally:
            nvrtc.nvrtcDestroyProgram(program)
        return code

    def load(self, device: int, code: bytes, /) -> Any:
        """See `Driver`."""
        module = self._ask_in_context(device, self._driver.cuModuleLoadData, code)
        return self._ask(self._driver.cuModuleGetFunction, module, _NAME.encode())

    def launch(self, device: int, kernel: Any, arguments: tuple[int, ...], /) -> None:
        """See `Driver`."""
        (status,) = self._launch(kernel, *arguments)
        if int(status):
            self._ask_in_context(device, self._launch, kernel, *arguments)

    def _ask_in_context(self, device: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function; a thread that has not used CUDA yet gets the context of the device."""
        status = function(*arguments)
        if status[0] != self._driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            return self._check(status)
        number = self._ask(self._driver.cuDeviceGet, device)
        # The context of torch and of the CUDA runtime; it lives as long as the process.
        context = self._ask(self._driver.cuDevicePrimaryCtxRetain, number)
        self._ask(self._driver.cuCtxSetCurrent, context)
        return self._ask(function, *arguments)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._check(function(*arguments))

    def _check(self, answer: tuple[Any, ...]) -> Any:
        status, *values = answer
        if int(status):
            raise RuntimeError(status.name)
        return values[0] if len(values) == 1 else values


class Cupy:
    """The driver through CuPy's own modules."""

    def __init__(self) -> None:
        from cupy.cuda import driver, nvrtc, runtime

        self._driver, self._nvrtc, self._runtime = driver, nvrtc, runtime

    def versions(self) -> tuple[int, int]:
        """See `Driver`."""
        major, minor = self._nvrtc.getVersion()
        return 1000 * major + 10 * minor, self._runtime.driverGetVersion()

    def compile(self, source: str, options: Sequence[str], /) -> bytes:
        """See `Driver`."""
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
        """See `Driver`."""
        self._runtime.setDevice(device)
        module = self._driver.moduleLoadData(code)  # for as long as the process lives
        return self._driver.moduleGetFunction(module, _NAME)

    def launch(self, device: int, kernel: Any, arguments: tuple[int, ...], /) -> None:
        """See `Driver`."""
        self._runtime.setDevice(device)  # makes its context current in this thread
        self._driver.launchKernel(kernel, *arguments)
