"""Gradient Centralization as an optax transformation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
from jax.tree_util import PyTreeDef

from gcx._centralize import check_strength
from gcx._dispatch import backend_for
from gcx._names import naming
from gcx.backends import _canonical
from gcx.optax._layouts import Layouts, source_of
from gcx.optax._mesh_axes import (
    AxisName,
    axes_by_path,
    centralize_split,
    check_axis_name,
    check_whole,
)
from gcx.optax._names import is_none, named_leaves, names_of
from gcx.optax._plan import plan_of
from gcx.plan import Plan

_PLANS_KEPT = 8  # for outer transformations that pass on several trees


class _Planned(NamedTuple):
    """The plan of one tree, and the mesh axes over which its fan-ins are split."""

    rows: Plan
    mesh_axes: Mapping[str, tuple[str, ...]]


def centralize(
    layouts: Layouts,
    *,
    strength: float = 1.0,
    axis_name: AxisName = None,
    reproducible: bool = False,
) -> optax.GradientTransformation:
    """Centralize the updates that pass: subtract their mean over the fan-in.

    The place in the chain says what is centralized:

    - ``chain(centralize, sgd)`` or ``chain(centralize, adamw)``: the gradient;
    - ``chain(add_decayed_weights, centralize, sgd)``: gradient and weight decay, the paper's SGD;
    - ``chain(adamw, centralize)``: the update with the decay in it, which the authors advise for
      adaptive optimizers;
    - ``chain(scale_by_adam, centralize, add_decayed_weights, scale_by_learning_rate)``: the update
      with the decay outside.

    The second, the third, and the first with SGD without weight decay keep the mean of each fan-in
    where it started (Corollary 4.1). Where it comes after the optimizer, weights narrower than 32
    bits round part of that away.

    Parameters
    ----------
    layouts : model, mapping, callable or str
        Which axes are fan-in, by the path of the parameter (``"Dense_0/kernel"``: names joined by
        ``/``, the ``.value`` of Flax boxes dropped). One of

        - an nnx or Equinox module: each parameter is judged by the layer that owns it;
        - a mapping from path to layout, None or `LeaveAlone`, such as `layouts` makes from any
          model; a path may be a glob (``"*/kernel"``), and the first that matches counts;
        - a function of path and array (of a gradient, or of a parameter: use its shape and dtype)
          that returns a layout, None or `LeaveAlone`;
        - a preset, for who has parameters and no model: ``"flax"`` (linen and nnx), ``"haiku"``,
          ``"equinox"`` or ``"keras"``.

        What nothing matches is left alone.
    strength : float, optional
        From 0 to 1: the part of the mean to subtract. A Python number: in
        `optax.inject_hyperparams` name it among the ``static_args``.
    axis_name : str, tuple of str or mapping, optional
        Inside `jax.shard_map` and `jax.pmap`: the mesh axes over which the fan-in is split, so
        that the mean is taken over these too. One name or tuple for all parameters, or a mapping
        from path or glob to name, tuple or None (the fan-in is whole). Name all the axes that
        split a fan-in: one that is missing here is not noticed. Not for `jax.jit` alone, under
        which XLA communicates by itself.
    reproducible : bool, optional
        Whether equal updates that arrive leave with equal bits in every program for a CPU, and as
        from the other libraries (see :doc:`/reproducible`). The arithmetic around it, such as that
        of the optimizer, XLA rounds as it likes.

    Returns
    -------
    optax.GradientTransformation
        Without state, for use alone or in `optax.chain`, `optax.masked`, `optax.multi_transform`,
        `optax.MultiSteps` and so on. Its ``init`` raises the errors of `plan`, and a ValueError if
        there are parameters and nothing is centralized, as within `optax.flatten`. Where
        `optax.masked` hides some, that is an error if the weights it shows are all unknown. A
        TypeError says where `reproducible` cannot be promised: for another dtype, off the CPU, for
        a fan-in that `axis_name` splits. Its ``update`` raises a ValueError where `axis_name` names
        an axis that is not bound, and in `jax.shard_map` where a gradient differs along an axis and
        `axis_name` says nothing of that gradient.

    Raises
    ------
    TypeError
        If `layouts` or `axis_name` is none of these, `layouts` is a model that has no layers
        before it sees an input (linen, Haiku: give those to `layouts`), or `strength` is an array.
    ValueError
        If there is no such preset, or `strength` is not a number from 0 to 1.

    See Also
    --------
    layouts : the mapping for a model; needed for linen and Haiku.
    plan : what would be centralized, and why not; print it before you train.

    Notes
    -----
    `optax.centralize` averages over all axes but the first, whatever the layer. On the kernels of
    Flax, Haiku and Keras, whose output axis is the last, those are not the fan-in.

    A model is read once, here: its arrays are neither kept nor looked at, only their shapes.

    **A preset goes by name and rank only.** Where the name says that they do not tell the fan-in
    (``Einsum_0``, ``ScanDense_0``, ``einsum_dense``), it leaves the kernel alone. Any other kernel
    it takes for that of an ordinary layer, and cannot know of

    - kernels stacked by ``scan`` or ``vmap``, which have one more axis (but it knows the
      ``layer_stack`` of Haiku);
    - several output axes, as of ``DenseGeneral``, ``Einsum`` or ``EinsumDense``;
    - a ``Conv1D`` called ``query``, which it takes for an attention projection;
    - transposed convolutions of Haiku and Keras, and depthwise ones of Keras, under other names;
    - ``ConvTranspose(transpose_kernel=True)`` and ``ConvLocal`` of Flax.

    For these use `layouts`, or start from the plan of the preset (see the examples).

    The variables of a Keras model are a list; a preset needs a dict of them by ``variable.path``.

    In `jax.pmap`, and in `jax.shard_map` with ``check_vma=False``, JAX does not know a part from a
    whole gradient: a fan-in that is split, and of which `axis_name` says nothing, is centralized
    part by part without an error. Nor does it know that a gradient is the same everywhere: one
    `axis_name` for all parameters would take a fan-in of 1 for a part of more, and its update would
    be 0. Give a mapping there.

    References
    ----------
    Yong, Huang, Hua and Zhang, "Gradient Centralization: A New Optimization Technique for Deep
    Neural Networks", ECCV 2020, equation (1) and algorithms 1 and 2.
    https://arxiv.org/abs/2004.01461

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import optax
    from jax.tree_util import PyTreeDef
    >>> import gcx.optax
    >>> params = {"dense": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
    >>> optimizer = optax.chain(gcx.optax.centralize("flax"), optax.sgd(1.0))
    >>> state = optimizer.init(params)
    >>> grads = {"dense": {"kernel": jnp.array([[1.0, 0.0], [3.0, 0.0]]), "bias": jnp.ones(2)}}
    >>> updates, state = optimizer.update(grads, state, params)
    >>> updates["dense"]["kernel"].tolist(), updates["dense"]["bias"].tolist()
    ([[1.0, -0.0], [-1.0, -0.0]], [-1.0, -1.0])

    A preset with exceptions, here for a layer with two output axes:

    >>> params["heads"] = {"kernel": jnp.zeros((2, 4, 3))}
    >>> layouts = {row.name: row.layout for row in gcx.optax.plan(params, "flax")}
    >>> layouts["heads/kernel"] = "ioo"
    >>> print(gcx.optax.plan(params, layouts))
    parameter     shape  layout  reason
    dense/bias    2      -       as given
    dense/kernel  2x2    ...o    as given
    heads/kernel  2x4x3  ioo     as given
    2 of 3 parameters centralized
    """
    source = source_of(layouts)
    _check_not_array(strength)
    check_strength(strength)
    check_axis_name(axis_name)
    centralize_one = partial(centralize_split, strength=strength, reproducible=reproducible)

    def plan_tree(tree: Any) -> _Planned:
        axes = axes_by_path(axis_name, names_of(tree))
        return _Planned(plan_of(tree, source, axes), axes)

    known: dict[Any, _Planned] = {}  # by structure, shapes and dtypes

    def recall_plan(tree: Any, leaves: Sequence[Any], structure: PyTreeDef) -> _Planned:
        key = structure, tuple(map(_form_of, leaves))
        planned = known.get(key) if _is_hashable(structure) else plan_tree(tree)
        if planned is None:
            planned = plan_tree(tree)
            if len(known) == _PLANS_KEPT:
                known.clear()
            known[key] = planned
        return planned

    def init(params: optax.Params) -> optax.OptState:
        planned = plan_tree(params)
        _check_not_idle(params, planned.rows)
        if reproducible:
            _check_reproducible(params, *planned)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
        rows, axes = recall_plan(updates, leaves, structure)
        centralized = [
            leaf
            if row.layout is None
            else centralize_one(leaf, row.layout, axes.get(row.name), row.name)
            for leaf, row in zip(leaves, rows, strict=True)
        ]
        return jax.tree.unflatten(structure, centralized), state

    return optax.GradientTransformation(init, update)


def _form_of(leaf: Any) -> tuple[tuple[int, ...], Any] | None:
    return (tuple(leaf.shape), leaf.dtype) if hasattr(leaf, "dtype") else None


def _is_hashable(structure: PyTreeDef) -> bool:
    try:
        hash(structure)
    except TypeError:  # static parts of a module need not be
        return False
    return True


def _check_not_array(strength: object) -> None:
    if isinstance(strength, jax.Array):
        msg = (
            f"strength is the part of the mean to subtract, a Python number and not {strength!r}: "
            'in optax.inject_hyperparams give static_args=("layouts", "strength", "axis_name")'
        )
        raise TypeError(msg)


def _check_not_idle(params: optax.Params, rows: Plan) -> None:
    weights = [row for row in rows if len(row.shape) > 1]
    is_known = not all(row.reason.startswith("unknown") for row in weights)
    is_elsewhere = names_of(params).hidden and (is_known or not weights)
    if is_elsewhere or any(row.layout is not None for row in rows):
        return
    shown = (weights or rows)[0]
    msg = (
        f"there is nothing to centralize in these {len(rows)} parameters; the first weight, "
        f"{shown.name!r}, is left alone for this reason: {shown.reason}. Print "
        "gcx.optax.plan(params, layouts) for the others. Within optax.flatten there is no fan-in "
        "to be seen: put gcx.optax.centralize before it"
    )
    raise ValueError(msg)


def _check_reproducible(
    params: optax.Params, rows: Plan, mesh_axes: Mapping[str, tuple[str, ...]]
) -> None:
    """Raise a TypeError that names the first parameter for which they cannot."""
    for (path, leaf), row in zip(named_leaves(params), rows, strict=True):
        if row.layout is None:
            continue
        check_whole(mesh_axes.get(path), path)
        with naming(path):
            if isinstance(leaf, jax.ShapeDtypeStruct):  # which is nowhere yet
                _canonical.check_dtype(leaf.dtype.name)
            else:
                fan_in = row.layout.fan_in_axes(len(row.shape))
                backend_for(leaf).check_reproducible(leaf, fan_in)
