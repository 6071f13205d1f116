"""Equality of arrays to the last bit, and who promises it."""

from __future__ import annotations

from typing import Any

import numpy as np

from libraries import ArrayLibrary


def assert_same_bits(found: Any, expected: Any) -> None:
    """Zeros with their signs; but NaN is NaN, since no library says which of them it makes.

    Numbers may have been widened, which tells them apart as before.
    """
    assert found.shape == expected.shape
    wide = np.result_type(found, expected)
    found, expected = found.astype(wide), expected.astype(wide)
    both_nan = np.isnan(found) & np.isnan(expected)
    wrong = np.argwhere((bits(found) != bits(expected)) & ~both_nan)
    assert not wrong.size, _first(wrong, found, expected)


def bits(x: Any) -> Any:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").reshape(x.shape)


def _first(wrong: Any, found: Any, expected: Any) -> str:
    where = tuple(map(int, wrong[0]))
    one, other = (float(x[where]).hex() for x in (found, expected))
    return f"{len(wrong)} of {found.size} elements differ, the first at {where}: {one}, not {other}"


def promises_bits(xp: ArrayLibrary) -> bool:
    """Whether the documentation promises these bits of a library on a device."""
    places = {"numpy": ("cpu",), "torch": ("cpu", "cuda"), "jax": ("cpu",), "cupy": ("cuda",)}
    return xp.device.startswith(places.get(xp.backend, ()))
