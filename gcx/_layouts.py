"""The argument `layouts`: one layout, a list, a mapping from names, or a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gcx._names import leaves_like, match_all, naming
from gcx.layout import Layout, LayoutLike, as_layout
from gcx.plan import Plan

Layouts = LayoutLike | Mapping[str, LayoutLike | None] | Sequence[Any] | Plan


def layouts_for(
    named: Sequence[tuple[str, Any]], layouts: Layouts, *, like: Any
) -> list[Layout | None]:
    """Find the layout of each named array; None leaves the array alone.

    A list or tuple of layouts must be built like the tree `like`, whose leaves are `named`.
    """
    if isinstance(layouts, (Layout, str)):
        return [as_layout(layouts)] * len(named)
    if isinstance(layouts, Plan):
        return [_find_in_plan(layouts, name, array) for name, array in named]
    if isinstance(layouts, (list, tuple)):
        leaves = leaves_like(like, layouts, what="layouts")
        return [None if leaf is None else as_layout(leaf) for leaf in leaves]
    if not isinstance(layouts, Mapping):
        raise TypeError(
            f"layouts is a layout, list, tuple, mapping or plan, not {type(layouts).__name__}"
        )
    keys = match_all(layouts, [name for name, _ in named], what="layouts")
    parsed = {key: None if v is None else as_layout(v) for key, v in layouts.items()}
    for name, _ in named:
        if name not in keys:
            raise ValueError(
                f"layouts: no key matches {name!r}; add it, or '*': None to leave the rest alone"
            )
    return [parsed[keys[name]] for name, _ in named]


def _find_in_plan(plan: Plan, name: str, array: Any) -> Layout | None:
    """Return the layout of a row; the array must have the row's shape."""
    try:
        row = plan[name]
    except KeyError as error:
        raise ValueError(f"layouts: {error.args[0]}") from None
    shape = row.shape if array is None else tuple(array.shape)
    if shape != tuple(row.shape):
        with naming(name):
            raise ValueError(f"the plan is for shape {row.shape}, this array has shape {shape}")
    return row.layout
