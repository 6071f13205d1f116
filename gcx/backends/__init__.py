"""One file a library, all with the same few functions, described by `Backend`.

`_array_api` is the reference, written in the array API standard alone; it serves every library
that has no file of its own. A library is imported in its own file and nowhere else in the core,
and that file is imported when the first array of the library arrives. The first line of each file
says how it does its work; ``python -m gcx`` shows it.

What is common to all libraries (layouts, fan-in below 2, `out` of the wrong shape) is settled
before a backend is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol, TypeVar, cast

__all__ = ["LIBRARIES", "Backend", "Library", "load", "one_by_one"]

ArrayT = TypeVar("ArrayT")

LIBRARIES = ("numpy", "torch", "jax", "cupy")


class Backend(Protocol):
    """What every file of this package provides, as module-level functions."""

    def check_dtype(self, grad: Any, /) -> None:
        """Raise a TypeError unless `grad` is a dense array of real or complex floating dtype."""

    def is_writable(self, array: Any, /) -> bool:
        """Whether elements of `array` can be assigned to."""

    def check_reproducible(self, grad: Any, axes: Sequence[int], /) -> None:
        """Raise a TypeError unless the bits of `_canonical` can be promised for `grad`."""

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

        Dtypes narrower than 32 bits are computed in float32 and rounded once. `axes` is not empty
        and holds at least two elements a mean; `out` may be `grad` itself. With `reproducible`,
        which `check_reproducible` has let through, sums are taken in the order of `_canonical`.
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
    """What a file for one library provides besides, for `python -m gcx` and the tests."""

    def devices(self) -> list[str]:
        """Names of the devices on which arrays can be made here; empty if there is none."""

    def asarray(self, values: Any, dtype: str, device: str, /) -> Any:
        """Make an array from a NumPy array."""

    def to_numpy(self, array: Any, /) -> Any:
        """Copy an array to a NumPy array, low precision widened to float32."""


def one_by_one(centralize: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Make the `centralize_many` of a library that gains nothing by taking several at once."""

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
