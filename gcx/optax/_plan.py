"""The plan of a tree of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

from gcx._decisions import decide
from gcx.backends._jax import is_floating
from gcx.layout import as_layout
from gcx.optax._layouts import Layouts, NameRule, Source, source_of
from gcx.optax._names import named_leaves, names_of
from gcx.plan import Plan, PlanRow


def plan(params: optax.Params, layouts: Layouts) -> Plan:
    """Show which parameters `centralize` would centralize, over which axes, and why.

    Parameters
    ----------
    params : pytree
        Parameters or gradients, or their `jax.ShapeDtypeStruct`. Leaves hidden by `optax.masked`
        are not listed.
    layouts : model, Plan, mapping, callable or str
        As in `centralize`.

    Returns
    -------
    gcx.plan.Plan
        One row per leaf, in the order of `jax.tree.leaves` (None included). Leaves that are not
        arrays of floating dtype, vectors, scalars and a fan-in below 2 are left alone, whatever
        `layouts` says.

    Raises
    ------
    TypeError
        If `layouts` has none of these forms, or gives anything but a layout, None or `LeaveAlone`.
    ValueError
        If a key of a mapping matches no parameter, visible or hidden; if a plan lacks a parameter,
        or has another shape for it; if a layout is not valid or does not fit the rank.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import gcx.optax
    >>> params = {
    ...     "Conv_0": {"kernel": jnp.zeros((3, 3, 1, 8)), "bias": jnp.zeros(8)},
    ...     "token": jnp.zeros((1, 8)),
    ... }
    >>> print(gcx.optax.plan(params, "flax"))
    parameter      shape    layout  reason
    Conv_0/bias    8        -       bias
    Conv_0/kernel  3x3x1x8  ...o    kernel
    token          1x8      -       unknown: no rule for this name
    1 of 3 parameters centralized
    """
    return plan_of(params, source_of(layouts), {})


def plan_of(params: optax.Params, source: Source, axes: Mapping[str, tuple[str, ...]]) -> Plan:
    """Make the plan of a tree; `axes` holds the mesh axes of the fan-ins that are split."""
    named = named_leaves(params)
    rule = source(names_of(params))
    return Plan(_row(name, leaf, rule, is_split=bool(axes.get(name))) for name, leaf in named)


def _row(name: str, leaf: Any, rule: NameRule, *, is_split: bool) -> PlanRow:
    if not hasattr(leaf, "dtype"):
        return PlanRow(name, (), None, "not an array")
    shape = tuple(leaf.shape)
    if not is_floating(leaf.dtype):
        return PlanRow(name, shape, None, "not of floating dtype")
    chosen, reason = rule(name, leaf)
    if chosen is None:
        return PlanRow(name, shape, None, reason)
    try:
        row = decide(name, shape, chosen, reason)
    except ValueError as error:
        msg = f"{error} (shape {shape})"
        raise ValueError(msg) from None
    if row.layout is None and is_split and as_layout(chosen).split(shape)[1]:
        return row._replace(layout=as_layout(chosen), reason=reason)  # a part of a longer fan-in
    return row
