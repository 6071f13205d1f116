"""The fan-in means of a weight: take them before a step, and restore them afterwards."""

from __future__ import annotations

from typing import Any

from gcx import _compat
from gcx._centralize import see_fan_in
from gcx._dispatch import backend_for
from gcx.layout import LayoutLike

__all__ = ["fan_in_mean", "restore_mean"]


def fan_in_mean(x: Any, layout: LayoutLike, *, reproducible: bool = False) -> Any:
    """Average over the fan-in, in float32 or wider; the fan-in axes stay, with size 1.

    If the layout splits an axis, so does the mean.
    """
    seen, axes = see_fan_in(x, layout, reproducible=reproducible)
    return backend_for(x).fan_in_mean(seen, axes, reproducible)


def restore_mean(
    x: Any, mean: Any, layout: LayoutLike, *, strength: float = 1.0, reproducible: bool = False
) -> Any:
    """Return `x` with its fan-in means moved back to `mean`, from `fan_in_mean` before a step.

    A `strength` below 1 undoes this part of their change.
    """
    moved = strength * (fan_in_mean(x, layout, reproducible=reproducible) - mean)
    seen, _ = see_fan_in(x, layout)
    xp = _compat.array_namespace(x)
    restored = xp.astype(xp.astype(seen, moved.dtype) - moved, x.dtype)
    return backend_for(x).reshape(restored, tuple(x.shape))
