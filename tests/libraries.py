"""The array libraries under test, each as the few functions a test needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from gcx import backends


@dataclass(frozen=True)
class ArrayLibrary:
    """One library on one device: how to make an array of it, and how to read one."""

    name: str
    backend: str  # the file of gcx.backends that must handle its arrays
    device: str
    from_numpy: Callable[[Any, str], Any]
    to_numpy: Callable[[Any], Any]

    def asarray(self, values: Any, dtype: str = "float64") -> Any:
        return self.from_numpy(np.array(values), dtype)

    def numpy(self, array: Any) -> Any:
        """A NumPy array that shares no memory with `array`; low precision comes as float32."""
        return np.array(self.to_numpy(array))

    @property
    def is_writable(self) -> bool:
        return self.name not in ("readonly", "jax")

    @property
    def narrow_dtypes(self) -> tuple[str, ...]:
        """Floating dtypes of fewer than 32 bits."""
        return _NARROW_DTYPES.get(self.name, _ML_DTYPES)

    def __str__(self) -> str:
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"


_ML_DTYPES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_NARROW_DTYPES = {"strict": (), "dask": ("float16",), "cupy": ("float16",)}


def _native(name: str) -> list[ArrayLibrary]:
    """The library on all of its devices, through its own backend file."""
    if name == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    library = backends.load(name)

    def on(device: str) -> ArrayLibrary:
        def from_numpy(values: Any, dtype: str) -> Any:
            return library.asarray(values, dtype, device)

        kind = "cpu" if "cpu" in device.lower() else device
        return ArrayLibrary(name, name, kind, from_numpy, library.to_numpy)

    return [on(device) for device in library.devices()]


def _readonly() -> list[ArrayLibrary]:
    library = backends.load("numpy")

    def from_numpy(values: Any, dtype: str) -> Any:
        array = library.asarray(values, dtype, "cpu").copy()
        array.flags.writeable = False
        return array

    return [ArrayLibrary("readonly", "numpy", "cpu", from_numpy, library.to_numpy)]


def _strict() -> list[ArrayLibrary]:
    import array_api_strict as strict

    def from_numpy(values: Any, dtype: str) -> Any:
        return strict.asarray(values, dtype=getattr(strict, dtype))

    def to_numpy(array: Any) -> Any:
        return np.from_dlpack(array).copy()

    return [ArrayLibrary("strict", "array_api", "cpu", from_numpy, to_numpy)]


def _dask() -> list[ArrayLibrary]:
    import dask
    import dask.array as da

    dask.config.set(scheduler="synchronous")  # for arrays so small, threads take the most time

    def from_numpy(values: Any, dtype: str) -> Any:
        # Cut along every axis, the fan-in too, and unevenly where the size allows it.
        return da.from_array(values.astype(dtype), [max(2, -(-n // 3)) for n in values.shape])

    return [ArrayLibrary("dask", "array_api", "cpu", from_numpy, np.asarray)]


MAKERS: dict[str, Callable[[], list[ArrayLibrary]]] = {
    name: partial(_native, name) for name in ("numpy", "torch", "jax", "cupy")
}
MAKERS |= {"readonly": _readonly, "strict": _strict, "dask": _dask}

_MODULES = {"readonly": "numpy", "strict": "array_api_strict"}


def installed(name: str) -> bool:
    """Whether the library is here; CuPy counts only where a GPU is, since it does nothing else."""
    found = find_spec(_MODULES.get(name, name)) is not None
    return found and (name != "cupy" or bool(backends.load("cupy").devices()))
