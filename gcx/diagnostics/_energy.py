"""The energy of a gradient, and the part that Gradient Centralization removes."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite, nan, prod
from typing import Any, NamedTuple

from gcx import _compat
from gcx._dispatch import backend_for
from gcx._names import naming
from gcx.plan import PlanRow

__all__ = ["Energy", "fan_in_size", "measure_energies"]


class Energy(NamedTuple):
    """The energy of a gradient, and the energy that centralizing removes.

    Attributes
    ----------
    removed : float
        Sum of ``M * mean**2`` over the output units, with the fan-in ``M``; 0 if the gradient is
        left alone.
    total : float
        Sum of the squares of all elements; not finite if an element is not finite.
    """

    removed: float
    total: float


def measure_energies(pairs: Iterable[tuple[PlanRow, Any]]) -> dict[str, Energy]:
    """Measure the gradients of one batch, by the name of the row; None is no gradient.

    Raises a TypeError that names the row if a gradient is not a dense floating array.
    """
    return {row.name: _measure(grad, row) for row, grad in pairs if grad is not None}


def _measure(grad: Any, row: PlanRow) -> Energy:
    with naming(row.name):
        backend_for(grad).check_dtype(grad)
    x = _gather(grad)
    xp = _compat.array_namespace(x)
    is_complex = "complex" in str(x.dtype)  # isdtype does not know the dtypes of ml_dtypes
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
    """Return the fan-in of a row that has a layout."""
    assert row.layout is not None
    view, axes = row.layout.split(row.shape)
    return prod(view[axis] for axis in axes)


def _gather(grad: Any) -> Any:
    """Convert a gradient to a whole array of a library and device with float64."""
    if _compat.is_jax_array(grad):
        from gcx.backends import _jax

        return _jax.to_numpy(grad)  # JAX may have no float64 in this process
    if not _compat.is_torch_array(grad):
        return grad
    from gcx.backends import _torch_dtensor

    tensor = grad.detach()
    if _torch_dtensor.is_dtensor(tensor):  # its shards alone are not enough
        tensor = tensor.full_tensor()
    return tensor.cpu() if tensor.device.type == "mps" else tensor
