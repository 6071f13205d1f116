"""Assertions for the tests of programs that use gcx."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from gcx import _compat
from gcx._centralize import OUTPUT_FIRST, see_fan_in
from gcx.layout import LayoutLike

__all__ = ["assert_centralized"]

_ADAM = (
    ". With Adam and its kin, centralized gradients do not keep the means of weights: "
    "check a gradient after the step (p.grad in torch), or centralize the update"
)


def assert_centralized(
    x: Any,
    /,
    *,
    start: Any | None = None,
    layout: LayoutLike = OUTPUT_FIRST,
    axis: int | Sequence[int] | None = None,
    rtol: float | None = None,
) -> None:
    """Assert that the mean over the fan-in is zero in each output unit, or unchanged since `start`.

    Steps of SGD with Gradient Centralization keep the means of a weight (Corollary 4.1), so this
    catches a wrong axis and a hook that never ran. Adam and its kin keep them only with
    ``where="update"``; otherwise check the gradient after the step, ``p.grad`` in torch.

    Parameters
    ----------
    x : array
        A gradient, or a weight after training if `start` is given.
    start : array, optional
        The weight before training. It must differ from `x`.
    layout, axis
        As in `gcx.centralize`.
    rtol : float, optional
        Largest allowed mean, or change of a mean, relative to the largest magnitude in the output
        unit; by default 64 times the machine epsilon. Dtypes below 32 bits have no default.

    Raises
    ------
    AssertionError
        If a mean is larger or not finite (the message shows the worst), or if `x` equals `start`.
    ValueError
        If there is no fan-in of at least 2, `start` has another shape, or `rtol` is missing.

    Examples
    --------
    >>> import numpy as np
    >>> from gcx.testing import assert_centralized
    >>> assert_centralized(np.array([[-1.0, 1.0], [2.0, -2.0]]))
    >>> assert_centralized(np.array([[3.0, 5.0]]), start=np.array([[4.0, 4.0]]))
    """
    if start is not None and tuple(start.shape) != tuple(x.shape):
        raise ValueError(f"start has shape {tuple(start.shape)}, the weight {tuple(x.shape)}")
    x, axes = see_fan_in(x, layout, axis)
    if not axes or 0 in x.shape:
        raise ValueError(
            f"nothing to check: no unit with a fan-in of at least 2 in shape {tuple(x.shape)}"
        )
    start = None if start is None else see_fan_in(start, layout, axis)[0]
    xp = _compat.array_namespace(x)
    arrays = [_widen(array, rtol) for array in (x, start) if array is not None]
    tolerance = 64 * float(xp.finfo(arrays[0].dtype).eps) if rtol is None else rtol
    change = arrays[0] if start is None else arrays[0] - arrays[1]
    if start is not None and not bool(xp.any(change != 0)):
        raise AssertionError("x equals start: nothing was trained, so nothing is shown")
    mean = xp.abs(xp.mean(change, axis=axes, keepdims=True))
    # Rounding is relative to the weights, not to their change.
    magnitude = reduce(xp.maximum, map(xp.abs, arrays))
    scale = xp.max(magnitude, axis=axes, keepdims=True)
    relative = xp.where(scale > 0, mean / xp.where(scale > 0, scale, xp.ones_like(scale)), mean)
    worst = float(xp.max(relative))
    if not worst <= tolerance:
        what, hint = ("a mean", "") if start is None else ("the change of a mean", _ADAM)
        raise AssertionError(
            f"not centralized: {what} over axes {axes} is {worst:.3g} of the largest magnitude, "
            f"more than {tolerance:.3g}{hint}"
        )


def _widen(array: Any, rtol: float | None) -> Any:
    if _compat.is_torch_array(array):
        array = array.detach()
    is_complex = "complex" in str(array.dtype)
    if getattr(array.dtype, "itemsize", 8) >= (8 if is_complex else 4):
        return array
    if rtol is None:
        raise ValueError(f"give rtol: rounding to {array.dtype} is too coarse for a default")
    xp = _compat.array_namespace(array)
    return xp.astype(array, xp.complex64 if is_complex else xp.float32)
