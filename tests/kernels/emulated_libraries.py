"""Torch, and a stand-in for CuPy, with kernels that the CPU emulates; a fixture for both."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cupy_stand_in
from emulated_cuda import EmulatedDriver
from kernel_cases import Case, numbers


class CupyOnCpu:
    """NumPy's arrays, which gcx takes for CuPy's."""

    name = "cupy"

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.cupy = cupy_stand_in.StandIn()
        self.backend = cupy_stand_in.install(patch, self.cupy)
        self.driver = type("Host", (EmulatedDriver, self.backend.Driver), {})()
        patch.setattr(self.backend, "Driver", lambda: self.driver)
        self.out_of_memory: type[Exception] = MemoryError  # CuPy's error is one

    def see(self, whole: Any, part: Any) -> Any:
        """See memory of NumPy as an array of the library."""
        return part.view(cupy_stand_in.Array)

    def numpy(self, array: Any) -> Any:
        return np.asarray(array)

    def capture(self, *, on: bool) -> None:
        """Begin or end to capture a CUDA graph."""
        self.cupy.is_capturing = on

    def lack_memory(self, patch: pytest.MonkeyPatch) -> None:
        """Let every allocation for the kernels fail."""
        patch.setattr(self.cupy.cuda, "alloc", self.fail_to_allocate)

    def fail_to_allocate(self, *_: object) -> None:
        raise self.out_of_memory


class TorchOnCpu(CupyOnCpu):
    """Torch's tensors on a CPU, which gcx takes for tensors on CUDA."""

    name = "torch"

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.torch = torch = pytest.importorskip("torch")
        self._flat: dict[int, Any] = {}
        from gcx.backends import _torch

        from torch_kernels import EMULATED, make_device

        self.driver, self.backend = make_device(EMULATED, patch).driver, _torch
        self.out_of_memory = torch.OutOfMemoryError

    def see(self, whole: Any, part: Any) -> Any:
        if whole.size == 0 or whole.dtype.kind == "c":
            return self.torch.from_numpy(part)
        width, dtype = whole.itemsize, getattr(self.torch, whole.dtype.name)
        memory = self.torch.from_numpy(whole.reshape(-1).view(f"i{width}")).view(dtype)
        flat = self._flat.setdefault(whole.ctypes.data, memory)  # torch sees overlaps
        steps = [stride // width for stride in part.strides]
        offset = (part.ctypes.data - whole.ctypes.data) // width
        return flat.as_strided(part.shape, steps, offset)

    def numpy(self, array: Any) -> Any:
        return self.backend.to_numpy(array)

    def capture(self, *, on: bool) -> None:
        self.driver.captures = on

    def lack_memory(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(self.driver, "allocate", self.fail_to_allocate)


def make(library: CupyOnCpu, case: Case, dtype: str) -> tuple[Any, Any]:
    """Make NumPy's memory of a case, and its part as an array of the library."""
    whole = numbers(case, dtype)
    return whole, library.see(whole, case.part(whole))


@pytest.fixture(params=[TorchOnCpu, CupyOnCpu], ids=lambda kind: kind.name)
def library(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[CupyOnCpu]:
    """Keep compiled kernels in a new cache."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    found: CupyOnCpu = request.param(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with np.errstate(all="ignore"):
        yield found
