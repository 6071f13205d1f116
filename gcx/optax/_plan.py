"""What happens to each parameter, and why."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import optax

from gcx._names import naming
from gcx.backends._jax import is_floating
from gcx.layout import Layout, LayoutLike, as_layout
from gcx.optax._layouts import TOO_FEW_AXES, Layouts, NameRule, Source, source_of
from gcx.optax._names import named_leaves, names_of
from gcx.plan import Plan, PlanRow


def plan(params: optax.Params, layouts: Layouts) -> Plan:
    """Tell what `centralize` does to each parameter, and why.

    Parameters
    ----------
    params : pytree
        Parameters or gradients, or their `jax.ShapeDtypeStruct`. Leaves that `optax.masked` hides
        are not listed.
    layouts : model, mapping, callable or str
        As in `centralize`.

    Returns
    -------
    gcx.plan.Plan
        One row per leaf, in the order of `jax.tree.leaves` (None included): name, shape, layout or
        None, reason. Left alone are, besides what `layouts` leaves alone: anything but an array of
        floating dtype, vectors and scalars, and a fan-in below 2.

    Raises
    ------
    TypeError
        If `layouts` is not one of the forms, or gives something else than a layout, None or
        `LeaveAlone`.
    ValueError
        If a key of a mapping matches no parameter (neither one that is seen, nor one that
        `optax.masked` or `optax.multi_transform` hide), or a layout is not valid or does not fit
        the rank.

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
    """Make the plan by a source of layouts, where `axes` tells which fan-ins are split."""
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
    layout, axes = _fan_in(name, shape, chosen)
    size = prod(shape[a] for a in axes)
    if size < 2 and not (axes and is_split):  # a part of one may belong to a fan-in of more
        obstacle = f"fan-in {size}: subtracting its mean would freeze it" if axes else TOO_FEW_AXES
        return PlanRow(name, shape, None, obstacle)
    return PlanRow(name, shape, layout, reason)


def _fan_in(
    name: str, shape: tuple[int, ...], chosen: LayoutLike
) -> tuple[Layout, tuple[int, ...]]:
    """Parse a layout and fit it to a shape; errors name the parameter."""
    with naming(name):
        try:
            layout = as_layout(chosen)
            return layout, layout.fan_in_axes(len(shape))
        except ValueError as error:
            msg = f"{error} (shape {shape})"
            raise ValueError(msg) from None
