"""PyTorch on CUDA: the driver and NVRTC by cuda.bindings, on which torch's CUDA builds depend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from gcx.backends.cuda.launcher import KERNEL


class Driver:
    """See `gcx.backends.cuda.launcher._Host`."""

    capability = staticmethod(torch.cuda.get_device_capability)
    is_capturing = staticmethod(torch.cuda.is_current_stream_capturing)

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver, nvrtc
        except ImportError as error:
            raise ImportError(f"{error} (pip install cuda-bindings)") from error
        self._driver, self._nvrtc = driver, nvrtc
        self._launch = driver.cuLaunchKernel

    def versions(self) -> tuple[int, int]:
        major, minor = self._ask(self._nvrtc.nvrtcVersion)
        return 1000 * major + 10 * minor, self._ask(self._driver.cuDriverGetVersion)

    def compile(self, source: str, options: Sequence[str], /) -> bytes:
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
        module = self._ask_in_context(device, self._driver.cuModuleLoadData, code)
        return self._ask(self._driver.cuModuleGetFunction, module, KERNEL.encode())

    def launch(self, device: int, kernel: Any, arguments: tuple[int, ...], /) -> None:
        (status,) = self._launch(kernel, *arguments)
        if int(status):
            self._ask_in_context(device, self._launch, kernel, *arguments)

    def current(self, device: int) -> AbstractContextManager[object]:
        return nullcontext() if torch.cuda.current_device() == device else torch.cuda.device(device)

    def stream(self, device: int) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def allocate(self, device: int, size: int) -> tuple[int, object]:
        memory = torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", device))
        return memory.data_ptr(), memory

    def _ask_in_context(self, device: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function; a thread that has not used CUDA yet gets the context of the device."""
        try:
            return self._ask(function, *arguments)
        except RuntimeError as error:
            if "INVALID_CONTEXT" not in str(error):
                raise
        number = self._ask(self._driver.cuDeviceGet, device)
        # The context of torch and of the CUDA runtime; it lives as long as the process.
        context = self._ask(self._driver.cuDevicePrimaryCtxRetain, number)
        self._ask(self._driver.cuCtxSetCurrent, context)
        return self._ask(function, *arguments)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        status, *values = function(*arguments)
        if int(status):
            raise RuntimeError(status.name)
        return values[0] if len(values) == 1 else values
