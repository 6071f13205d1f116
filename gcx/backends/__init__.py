"""One file for each library, all with the same few functions, described by `Backend`.

`_array_api` is the reference, written in the array API standard alone. It serves every library
without a file of its own. A library is imported in its own file and nowhere else in the core, when
its first array arrives. The first line of each file says how it works; ``python -m gcx`` shows it.

Layouts, a fan-in below 2 and an `out` of the wrong shape are handled before a backend is called.
A backend finishes its work: no gradient is handed back for somebody else to centralize.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol, TypeVar, cast

__all__ = ["LIBRARIES", "Backend", "Library", "load", "one_by_one"]

ArrayT = TypeVar("ArrayT")

LIBRARIES = ("numpy", "torch", "jax", "cupy")


class Backend(Protocol):
    """Functions that every file of this package provides."""

    def check_dtype(self, grad: Any, /) -> None:
        """Raise a TypeError unless `grad` is a dense array of real or complex floating dtype."""

    def is_writable(self, array: Any, /) -> bool:
        """Whether elements of `array` can be assigned to."""

    def check_reproducible(self, grad: Any, axes: Sequence[int], /) -> None:
        """Raise a TypeError unless the bits of `_canonical` can be promised for `grad`."""

    def reshape(self, array: ArrayT, shape: tuple[int, ...], /) -> ArrayT:
        """Split or join neighbouring axes."""

    def fan_in_mean(self, x: ArrayT, axes: tuple[int, ...], reproducible: bool, /) -> ArrayT:
        """Mean over `axes`, which stay with size 1; in float32 at least."""

    def centralize(
        self,
        grad: ArrayT,
        axes: tuple[int, ...],
        strength: float,
        out: ArrayT | None,
        reproducible: bool,
        /,
    ) -> ArrayT:
        """Return ``grad - strength * mean(grad, axes)``, written to `out` unless that is None.

        Dtypes narrower than 32 bits are computed in float32 and rounded once. Each mean has at
        least two elements; `out` may be `grad` itself. With `reproducible`, which
        `check_reproducible` has allowed, sums are taken in the order of `_canonical`.
        """

    def centralize_many(
        self,
        grads: Sequence[ArrayT],
        axes: Sequence[tuple[int, ...]],
        strength: float,
        outs: Sequence[ArrayT | None],
        reproducible: bool,
        /,
    ) -> list[ArrayT]:
        """Do the same for several arrays, each with its own axes; see `one_by_one`."""


class Library(Backend, Protocol):
    """Functions that a file for one library adds, for `python -m gcx` and the tests."""

    def devices(self) -> list[str]:
        """Names of the devices on which arrays can be made here; empty if there is none."""

    def asarray(self, values: Any, dtype: str, device: str, /) -> Any:
        """Make an array from a NumPy array."""

    def to_numpy(self, array: Any, /) -> Any:
        """Copy an array to a NumPy array, low precision widened to float32."""


def one_by_one(centralize: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Make the `centralize_many` of a library that gains nothing from a list."""

    def centralize_many(
        grads: Sequence[Any],
        axes: Sequence[tuple[int, ...]],
        strength: float,
        outs: Sequence[Any],
        reproducible: bool,
        /,
    ) -> list[Any]:
        """See `gcx.backends.Backend`."""
        return [
            centralize(grad, fan_in, strength, out, reproducible)
            for grad, fan_in, out in zip(grads, axes, outs, strict=True)
        ]

    return centralize_many


def load(library: str) -> Library:
    """Import the backend of one of `LIBRARIES`, and so the library.

    Raises
    ------
    ImportError
        If the library is not installed.
    """
    return cast("Library", import_module(f"gcx.backends._{library}"))
