"""The plan of a model for Muon, which orthogonalizes matrices (fan-in, output)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import optax

from gcx._names import match_all
from gcx.optax._layouts import Layouts, plan
from gcx.optax._models._parameters import SIDE_BY_SIDE
from gcx.optax._names import is_none
from gcx.plan import PlanRow


def muon_dimension_numbers(
    params: optax.Params, layouts: Layouts, *, exclude: str | Sequence[str] = ()
) -> optax.Params:
    """Tell `optax.contrib.muon` which axes of each weight make a matrix, and which are a stack.

    The fan-in is the reduction axis, and ``o`` the output axis. Each entry of a stack (``b``) is a
    matrix of its own. A weight that the plan leaves alone, such as an embedding, is for Adam; so is
    one with a single output, which is a vector. Needs optax 0.2.6.

    The dimension numbers cannot split an axis, so exclude convolutions in groups and weights of all
    gates. An error names them if `layouts` is from the model. :doc:`/plans_for_others` lists the
    gates that are one Linear or Conv to a plan. A mapping of your own, or a preset, tells neither.

    Parameters
    ----------
    params, layouts
        As in `plan`.
    exclude : str or sequence of str, optional
        Paths or globs of further weights for Adam, such as the head: ``exclude="lm_head/*"``.

    Returns
    -------
    pytree
        Like `params`, of `optax.contrib.MuonDimensionNumbers` or None, for the argument
        ``muon_weight_dimension_numbers``. Muon calls whatever is callable, so a callable Equinox
        module comes as a function that returns it.

    Raises
    ------
    TypeError, ValueError
        As `plan`; if `exclude` matches no parameter, or a weight is a stack along part of an axis.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import gcx.optax
    >>> params = {"experts": jnp.ones((3, 8, 4)), "bias": jnp.ones(4)}
    >>> numbers = gcx.optax.muon_dimension_numbers(params, {"experts": "bio"})
    >>> numbers["experts"]
    MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
    >>> optimizer = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=numbers)
    """
    rows = plan(params, layouts)
    keys: Any = exclude if isinstance(exclude, (list, tuple, set)) else [exclude]
    excluded = match_all(keys, [row.name for row in rows], what="exclude")
    # Matrices that are a stack along a part of an axis.
    split = [
        row
        for row in rows
        if row.layout and row.name not in excluded
        if row.layout.is_split or row.reason.endswith(SIDE_BY_SIDE)
    ]
    if split:
        weights = ", ".join(f"{row.name} ({row.layout!r}, {row.reason})" for row in split)
        raise ValueError(
            f"Muon's dimension numbers cannot split an axis: name in exclude= {weights}"
        )
    numbers = [None if row.name in excluded else _numbers(row) for row in rows]
    tree = jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_none), numbers)
    return (lambda _: tree) if callable(tree) else tree


def _numbers(row: PlanRow) -> optax.contrib.MuonDimensionNumbers | None:
    if row.layout is None or len(row.shape) < 2:
        return None
    letters = row.layout.letters(len(row.shape))
    output = tuple(axis for axis, letter in enumerate(letters) if letter == "o")
    if prod(row.shape[axis] for axis in output) < 2:
        return None
    return optax.contrib.MuonDimensionNumbers(row.layout.fan_in_axes(len(row.shape)), output)
