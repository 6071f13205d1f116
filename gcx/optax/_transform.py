"""Gradient Centralization as an optax transformation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

import gcx
from gcx._centralize import check_strength
from gcx._decisions import check_choice, refuse_empty
from gcx._names import match_all, naming
from gcx.backends import _canonical, _jax
from gcx.optax._layouts import PRESET_NAMES, Layouts, Source, plan_of, source_of
from gcx.optax._names import is_none, named_leaves, names_of
from gcx.plan import Plan, PlanRow

_AxisNames = str | tuple[str, ...] | None
AxisName = _AxisNames | Mapping[str, _AxisNames]
MeshAxes = Mapping[str, tuple[str, ...]]  # () if the fan-in is whole

# The plan of a tree, and by path the mesh axes that split a fan-in, as far as the user names them.
_Planned = tuple[Plan, MeshAxes]


class _Planner:
    """Plans the trees that pass a transformation, and remembers their plans."""

    def __init__(self, source: Source, mesh_axes: MeshAxes) -> None:
        self._source, self._mesh_axes = source, mesh_axes
        self._known: dict[Any, _Planned] = {}
        self._ranks: dict[str, int] = {}

    def plan_params(self, params: Any) -> _Planned:
        self._known.clear()  # these plans were checked against other ranks
        for name, rank in _ranks(params).items():
            self._ranks[name] = max(rank, self._ranks.get(name, 0))
        return self._plan(params)

    def plan_grads(self, grads: Any, params: Any) -> _Planned:
        """Plan gradients, or return the plan of earlier gradients like them."""
        leaves, structure = jax.tree.flatten((grads, params))
        kinds = [(tuple(getattr(x, "shape", ())), getattr(x, "dtype", None)) for x in leaves]
        form = structure, *kinds
        if form in self._known:
            return self._known[form]
        ranks = self._ranks if params is None else _ranks(params)
        for name, rank in _ranks(grads).items():
            if rank > ranks.get(name, rank):
                raise ValueError(
                    f"{name}: the parameter has rank {ranks[name]}, and its gradient rank {rank}. "
                    "If these are gradients of single examples, put gcx.optax.centralize after "
                    "their average (optax.contrib.differentially_private_aggregate), or jax.vmap it"
                )
        return self._known.setdefault(form, self._plan(grads))

    def _plan(self, tree: Any) -> _Planned:
        names = names_of(tree)
        keys = match_all(self._mesh_axes, names.visible, what="axis_name", hidden=names.hidden)
        axes = {path: self._mesh_axes[key] for path, key in keys.items()}
        return plan_of(tree, self._source, axes), axes


def _ranks(tree: Any) -> dict[str, int]:
    return {name: len(leaf.shape) for name, leaf in named_leaves(tree) if hasattr(leaf, "shape")}


def centralize(
    layouts: Layouts,
    *,
    strength: float = 1.0,
    axis_name: AxisName = None,
    reproducible: bool = False,
) -> optax.GradientTransformation:
    """Centralize updates: subtract their mean over the fan-in.

    It centralizes the gradient in ``chain(centralize, sgd)``, and the update in ``chain(adamw,
    centralize)``. Around a base optimizer, as in `optax.contrib.schedule_free`, it goes inside:
    :doc:`/optax` says which chains keep the means of the weights (Corollary 4.1).

    Parameters
    ----------
    layouts : model, Plan, mapping, callable or str
        Layouts by the path of the parameter, such as ``"Dense_0/kernel"``. One of

        - an nnx or Equinox module, or a dict or list of them; linen and Haiku models go through
          `layouts`;
        - a plan, which must have a row of the same shape for each parameter;
        - a mapping from path or glob (``"*/kernel"``) to layout, None or `LeaveAlone`, such as
          `layouts` returns; the first key that matches counts, the rest is left alone;
        - a function of path and array that returns a layout, None or `LeaveAlone`, and depends on
          the path, shape and dtype alone;
        - a preset that guesses by names: ``"flax"``, ``"haiku"`` or ``"equinox"``.
    strength : float, optional
        Fraction of the mean to subtract, a Python number from 0 to 1.
    axis_name : str, tuple of str or mapping, optional
        Inside `jax.shard_map` and `jax.pmap`: the mesh axes that split the fan-in, for all
        parameters or by path or glob (None: the fan-in is whole). See :doc:`/jax_sharding`.
    reproducible : bool, optional
        Give equal bits in every program for a CPU (see :doc:`/reproducible`).

    Returns
    -------
    optax.GradientTransformation
        Without state.

    Raises
    ------
    TypeError, ValueError
        If an option has none of these forms. In ``init``: as `plan`, if there is nothing to
        centralize, or `reproducible` is not possible. In ``update``: if gradients have too many
        axes, or `axis_name` does not fit the mesh; JAX's NameError, if none is bound.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import gcx.optax
    >>> params = {"dense": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
    >>> optimizer = optax.chain(gcx.optax.centralize("flax"), optax.sgd(1.0))
    >>> state = optimizer.init(params)
    >>> grads = {"dense": {"kernel": jnp.array([[1.0, 0.0], [3.0, 0.0]]), "bias": jnp.ones(2)}}
    >>> updates, state = optimizer.update(grads, state, params)
    >>> updates["dense"]["kernel"].tolist(), updates["dense"]["bias"].tolist()
    ([[1.0, -0.0], [-1.0, -0.0]], [-1.0, -1.0])
    """
    planner = _Planner(source_of(layouts), _read_axis_name(axis_name))
    check_strength(strength)
    check_choice("reproducible", reproducible, (True, False))

    def init(params: optax.Params) -> optax.OptState:
        rows, axes = planner.plan_params(params)
        _check_not_idle(params, rows)
        for row, (path, leaf) in zip(rows, named_leaves(params), strict=True):
            if reproducible and row.layout is not None:
                _check_whole(axes.get(path), path)
                with naming(path):
                    _canonical.check_dtype(leaf.dtype.name)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        rows, axes = planner.plan_grads(updates, params)
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
        centralized = [
            _centralize_one(leaf, row, axes.get(row.name), strength, reproducible=reproducible)
            for leaf, row in zip(leaves, rows, strict=True)
        ]
        return jax.tree.unflatten(structure, centralized), state

    return optax.GradientTransformation(init, update)


def _check_not_idle(params: optax.Params, rows: Plan) -> None:
    weights = [row for row in rows if len(row.shape) > 1]
    are_unknown = weights and all(row.reason.startswith("unknown") for row in weights)
    if are_unknown or not names_of(params).hidden:
        owner = "these parameters (optax.flatten hides the fan-in: put gcx.optax.centralize first)"
        hint = f"give the model, or a preset that has such names ({PRESET_NAMES})"
        refuse_empty(rows, owner, hint=hint)


# --- fan-ins that mesh axes split, inside `jax.shard_map` and `jax.pmap` ---


def _read_axis_name(axis_name: AxisName) -> MeshAxes:
    """Read the argument `axis_name` into mesh axes by path or glob."""
    if axis_name is None:
        return {}
    given = axis_name if isinstance(axis_name, Mapping) else {"*": axis_name}
    mesh_axes = {}
    for path, names in given.items():
        axes = names if isinstance(names, tuple) else () if names is None else (names,)
        if not all(isinstance(axis, str) for axis in axes):
            raise TypeError(
                f"axis_name is a mesh axis, a tuple, None, or a mapping to these, not {names!r}"
            )
        mesh_axes[path] = axes
    return mesh_axes


def _centralize_one(
    grad: Any, row: PlanRow, axes: tuple[str, ...] | None, strength: float, *, reproducible: bool
) -> Any:
    """Centralize a gradient whose fan-in is split over these mesh axes (None: not known)."""
    path, _, layout, _ = row
    if layout is None:
        return grad
    varying = sorted(_jax.varying_axes(grad))
    if varying and axes is None:
        raise ValueError(
            f"{path}: this gradient differs along the mesh axis {varying[0]!r}, and its fan-in may "
            f"be split over it. If it is, give axis_name={{{path!r}: {varying[0]!r}}}; if each "
            f"device holds a whole fan-in, axis_name={{{path!r}: None}}"
        )
    if layout.is_split and (axes or varying):
        raise ValueError(
            f"{path}: {layout!r} splits an axis of the whole weight, and this may be a shard; "
            "give the weight an axis for each letter, or shard it by jit alone"
        )
    if not axes:
        with naming(path):
            return gcx.centralize(grad, layout=layout, strength=strength, reproducible=reproducible)
    if reproducible:
        _check_whole(axes, path)
    return _jax.centralize_over_mesh(grad, layout.fan_in_axes(grad.ndim), strength, axes)


def _check_whole(axes: tuple[str, ...] | None, path: str) -> None:
    """Raise a TypeError if a fan-in is split, whose elements then have no known order."""
    if axes:
        raise TypeError(
            f"{path}: reproducible=True needs each fan-in whole on one device, and axis_name "
            f"splits this one over {axes}; split another axis of the weight"
        )
