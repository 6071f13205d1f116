"""One file for each library, all with the functions of `Backend`.

`_array_api` is the reference. It uses only the array API standard, and serves every library
without its own file. The core imports a library in that file alone, with its first array.
The first line of each file says how it works; ``python -m gcx`` shows it.

Layouts, a fan-in below 2 and an `out` of the wrong shape are handled before a backend is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Never, Protocol, TypeVar, cast

from gcx._memory import Memory

__all__ = ["LIBRARIES", "Backend", "Library", "load", "one_by_one"]

ArrayT = TypeVar("ArrayT")
Axes = tuple[int, ...]

LIBRARIES = ("numpy", "torch", "jax", "cupy")


class Backend(Protocol):
    """The functions of every file in this package."""

    def check_dtype(self, grad: Any, /) -> None:
        """Raise a TypeError unless `grad` is a dense array of real or complex floating dtype."""

    def is_writable(self, out: Any, grad: Any, /) -> bool:
        """Return True if the result for `grad` can be written to `out`, which may be `grad`."""

    def find_memory(self, array: Any, /) -> Memory:
        """Find the memory of the elements; a hidden one starts at the `id` of the array."""

    def check_reproducible(self, grad: Any, axes: Sequence[int], /) -> None:
        """Raise a TypeError unless this library can sum `grad` in the order of `_canonical`."""

    def fan_in_mean(self, x: ArrayT, axes: Axes, reproducible: bool, /) -> ArrayT:
        """Average over `axes` in float32 or wider; the axes stay, with size 1."""

    def centralize(
        self, grad: ArrayT, axes: Axes, strength: float, out: ArrayT | None, reproducible: bool, /
    ) -> ArrayT:
        """Return ``grad - strength * mean(grad, axes)``, written to `out` unless that is None.

        Dtypes narrower than 32 bits are computed in float32 and rounded once. `out` may be `grad`
        itself. If `reproducible` is True, `check_reproducible` has passed.
        """

    def centralize_many(
        self,
        grads: Sequence[ArrayT],
        axes: Sequence[Axes],
        strength: float,
        outs: Sequence[ArrayT | None],
        reproducible: bool,
        /,
    ) -> list[ArrayT]:
        """Centralize each over its own axes; no `out` shares memory with another gradient."""


class Library(Backend, Protocol):
    """Further functions of a file for one library, for `python -m gcx` and the tests."""

    def devices(self) -> list[str]:
        """List the devices of this machine that can hold arrays."""

    def asarray(self, values: Any, dtype: str, device: str, /) -> Any:
        """Make an array from a NumPy array."""

    def to_numpy(self, array: Any, /) -> Any:
        """Copy an array to a NumPy array; narrow dtypes become float32."""


def one_by_one(centralize: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Make a `centralize_many` that centralizes one array after the other."""
    return lambda grads, axes, strength, outs, reproducible: [
        centralize(grad, fan_in, strength, out, reproducible)
        for grad, fan_in, out in zip(grads, axes, outs, strict=True)
    ]


def refuse_dtype(dtype: object) -> Never:
    raise TypeError(f"expected a real or complex floating dtype, not {dtype}; convert the array")


def load(library: str) -> Library:
    """Import the backend of a library in `LIBRARIES`; an ImportError if that is not installed."""
    return cast("Library", import_module(f"gcx.backends._{library}"))
