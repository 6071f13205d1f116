"""NumPy in the place of CuPy: their functions are the same by name and meaning."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from importlib.util import find_spec, module_from_spec
from types import ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pytest


class Array(np.ndarray):
    """An array of NumPy with the attributes that arrays of CuPy have."""

    @property
    def data(self) -> Any:
        addressed[self.ctypes.data] = self
        return SimpleNamespace(ptr=self.ctypes.data)

    @property
    def device(self) -> Any:
        return Device(0)


# Arrays whose address has been asked for.
addressed: WeakValueDictionary[int, Array] = WeakValueDictionary()


class Device(nullcontext[None]):
    """There is one, and it is always the current one."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.id = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return self.id


class StandIn(ModuleType):
    """What stands for the module `cupy`: NumPy, and what CuPy has besides."""

    def __init__(self, *, is_hip: bool = False) -> None:
        super().__init__("cupy")
        self.is_capturing = False
        self.cuda = SimpleNamespace(
            Device=Device,
            runtime=SimpleNamespace(is_hip=is_hip, getDevice=lambda: 0),
            get_current_stream=lambda: SimpleNamespace(
                ptr=0, is_capturing=lambda: self.is_capturing
            ),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def asarray(self, values: Any) -> Array:
        return np.array(values).view(Array)

    def empty(self, shape: Any, dtype: Any) -> Array:
        return np.full(shape, np.nan, dtype).view(Array)  # as nobody may rely on what is there

    def zeros(self, shape: Any, dtype: Any) -> Array:
        return np.zeros(shape, dtype).view(Array)


def install(patch: pytest.MonkeyPatch, cupy: StandIn) -> ModuleType:
    """Let gcx take `cupy` for CuPy; returns its backend, loaded afresh."""
    from gcx import _dispatch, backends

    patch.setitem(sys.modules, "cupy", cupy)
    for name in ("_cupy_kernels", "_cupy"):  # in this order: the second imports the first
        qualified = f"gcx.backends.{name}"
        spec = find_spec(qualified)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        patch.setitem(sys.modules, qualified, module)
        patch.setattr(backends, name, module, raising=False)
        spec.loader.exec_module(module)
    patch.setattr(_dispatch, "_by_type", {Array: module})
    return module
