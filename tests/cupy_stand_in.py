"""NumPy, which gcx takes for CuPy: their functions have the same names and meanings."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from importlib.util import find_spec, module_from_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest


class Array(np.ndarray):
    """A NumPy array with the attributes of CuPy's arrays."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data, owner=self)

    @property
    def device(self) -> Any:
        return DEVICE


class Device(nullcontext[None]):
    """There is one, and it is always the current one."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.id = number
        self.compute_capability = "90"


DEVICE = Device(0)


class StandIn(ModuleType):
    """NumPy, with the attributes that only CuPy has."""

    def __init__(self, *, is_hip: bool = False) -> None:
        super().__init__("cupy")
        self.is_capturing = False
        self.cuda = SimpleNamespace(
            Device=Device,
            alloc=lambda size: self.empty(size, np.uint8).data,
            runtime=SimpleNamespace(is_hip=is_hip, getDeviceCount=lambda: 1),
            get_current_stream=lambda: SimpleNamespace(
                ptr=7, is_capturing=lambda: self.is_capturing
            ),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def asarray(self, values: Any) -> Array:
        return np.array(values).view(Array)

    def asnumpy(self, array: Array) -> Any:
        return np.array(array)

    def empty(self, shape: Any, dtype: Any) -> Array:
        # No caller may rely on the contents.
        return np.full(shape, 127 if np.dtype(dtype).kind in "iu" else np.nan, dtype).view(Array)

    def is_available(self) -> bool:
        return True

    def zeros(self, shape: Any, dtype: Any) -> Array:
        return np.zeros(shape, dtype).view(Array)


def install(patch: pytest.MonkeyPatch, cupy: StandIn, make_driver: Any = None) -> Any:
    """Let gcx take `cupy` for CuPy; return its backend, loaded afresh."""
    from gcx import _dispatch, backends

    patch.setitem(sys.modules, "cupy", cupy)
    name = "gcx.backends._cupy"
    spec = find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module: Any = module_from_spec(spec)
    patch.setitem(sys.modules, name, module)
    patch.setattr(backends, "_cupy", module, raising=False)
    spec.loader.exec_module(module)
    if make_driver is not None:
        module.Driver = make_driver
    patch.setattr(_dispatch, "by_type", {Array: module})
    return module
