"""The array API standard alone: the reference, and the backend of every other library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gcx import _compat
from gcx._memory import Memory
from gcx.backends import _canonical, one_by_one, refuse_dtype


def check_dtype(grad: Any, /) -> None:
    if _compat.is_pydata_sparse_array(grad):
        raise TypeError("expected a dense array, not a sparse one; call .todense()")
    if not _compat.array_namespace(grad).isdtype(grad.dtype, ("real floating", "complex floating")):
        refuse_dtype(grad.dtype)


def is_writable(out: Any, _grad: Any, /) -> bool:
    return bool(_compat.is_writeable_array(out))


def find_memory(array: Any, /) -> Memory:
    return Memory(id(array))  # the standard does not tell the address


def check_reproducible(grad: Any, _axes: Sequence[int], /) -> None:
    _canonical.check_dtype(str(grad.dtype).rpartition(".")[2])
    raise TypeError(
        f"reproducible=True is for NumPy, CuPy, torch and JAX, not {type(grad).__module__}"
    )


def centralize(
    grad: Any, axes: tuple[int, ...], strength: float, out: Any | None, reproducible: bool, /
) -> Any:
    xp = _compat.array_namespace(grad)
    mean = fan_in_mean(grad, axes, reproducible)
    result = xp.astype(xp.astype(grad, mean.dtype) - strength * mean, grad.dtype)
    if out is None:
        return result
    out[...] = result
    return out


centralize_many = one_by_one(centralize)


def fan_in_mean(x: Any, axes: tuple[int, ...], reproducible: bool, /) -> Any:
    """Average in double precision, and correct by the mean of the remainder.

    A plain loop in float32 gets the second digit wrong for a million equal numbers.
    """
    assert not reproducible
    xp = _compat.array_namespace(x)
    dtype = xp.float32 if xp.finfo(x.dtype).bits < 32 else x.dtype
    double = xp.complex128 if xp.isdtype(x.dtype, "complex floating") else xp.float64
    wide = xp.astype(x, double)
    mean = xp.mean(wide, axis=axes, keepdims=True)
    return xp.astype(mean + xp.mean(wide - mean, axis=axes, keepdims=True), dtype)
