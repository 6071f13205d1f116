"""The fan-in means of a weight: take them before a step, and restore them afterwards."""

from __future__ import annotations

from typing import Any

from gcx import _compat
from gcx._centralize import see_fan_in
from gcx._dispatch import backend_for, reshape
from gcx.layout import LayoutLike


def fan_in_mean(x: Any, layout: LayoutLike, *, reproducible: bool = False) -> Any:
    """Average over the fan-in, in float32 or wider; the axes of `see_fan_in` stay, with size 1."""
    seen, axes = see_fan_in(x, layout, reproducible=reproducible)
    return backend_for(x).fan_in_mean(seen, axes, reproducible)


def subtract_mean(x: Any, mean: Any, layout: LayoutLike) -> Any:
    """Subtract a mean of the form of `fan_in_mean`; the result has the shape and dtype of `x`."""
    seen, _ = see_fan_in(x, layout)
    xp = _compat.array_namespace(x)
    return reshape(xp.astype(xp.astype(seen, mean.dtype) - mean, x.dtype), tuple(x.shape))


def restore_mean(
    x: Any, mean: Any, layout: LayoutLike, *, strength: float = 1.0, reproducible: bool = False
) -> Any:
    """Move the fan-in means of `x` back to `mean`, taken before a step, by the part `strength`."""
    moved = fan_in_mean(x, layout, reproducible=reproducible) - mean
    if strength != 1.0:
        moved = strength * moved
        # Otherwise XLA rounds the product and the subtraction that follows together, once.
        xp = _compat.array_namespace(x)
        moved = xp.where(xp.isnan(moved), xp.nan, moved) if reproducible else moved
    return subtract_mean(x, moved, layout)
