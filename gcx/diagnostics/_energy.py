"""The energy of one gradient, and the part of it that Gradient Centralization removes."""

from __future__ import annotations

from math import isfinite, nan, prod
from typing import Any, NamedTuple

from gcx import _compat
from gcx._dispatch import backend_for
from gcx._names import naming
from gcx.plan import PlanRow

__all__ = ["Energy", "energy_of", "fan_in_size"]


class Energy(NamedTuple):
    """Squared norm of a gradient, and of what subtracting the means takes from it.

    Attributes
    ----------
    removed : float
        The sum of ``M * mean**2`` over the output units, with the fan-in ``M``; 0 if the gradient
        is left alone.
    total : float
        The sum of the squares of all elements; not finite if one of them is not.
    """

    removed: float
    total: float


def energy_of(grad: Any, row: PlanRow) -> Energy:
    """Measure the gradient of the parameter of a row, in float64 whatever its dtype.

    Raises a TypeError that names the parameter if the gradient is not a dense array of floating
    dtype.
    """
    with naming(row.name):
        backend_for(grad).check_dtype(grad)
    x = _with_float64(grad)
    xp = _compat.array_namespace(x)
    is_complex = "complex" in str(x.dtype)  # isdtype refuses the dtypes of ml_dtypes
    wide = xp.astype(x, xp.complex128 if is_complex else xp.float64)
    total = float(xp.sum(xp.abs(wide) ** 2))
    if row.layout is None:
        return Energy(0.0, total)
    if not isfinite(total):
        return Energy(nan, total)
    view, axes = row.layout.split(row.shape)
    means = xp.mean(xp.reshape(wide, view), axis=axes)
    return Energy(fan_in_size(row) * float(xp.sum(xp.abs(means) ** 2)), total)


def fan_in_size(row: PlanRow) -> int:
    """Count the elements of one mean in a row that has a layout."""
    assert row.layout is not None
    view, axes = row.layout.split(row.shape)
    return prod(view[axis] for axis in axes)


def _with_float64(grad: Any) -> Any:
    """Bring a gradient to where it is whole, and can be summed in float64."""
    if _compat.is_jax_array(grad):
        from gcx.backends import _jax

        return _jax.to_numpy(grad)  # since JAX has no float64 unless the whole process does
    if not _compat.is_torch_array(grad):
        return grad
    from gcx.backends import _torch_dtensor

    tensor = grad.detach()
    if _torch_dtensor.is_dtensor(tensor):  # sums of its parts are not its sum
        tensor = tensor.full_tensor()
    return tensor.cpu() if tensor.device.type == "mps" else tensor
