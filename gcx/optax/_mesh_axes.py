"""Fan-ins that mesh axes split, inside `jax.shard_map` and `jax.pmap`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gcx._centralize import centralize
from gcx._names import match_all, naming
from gcx.backends import _jax
from gcx.optax._names import Names
from gcx.plan import PlanRow

_Names = str | tuple[str, ...] | None
AxisName = _Names | Mapping[str, _Names]
MeshAxes = Mapping[str, tuple[str, ...]]  # () if the fan-in is whole


def read_axis_name(axis_name: AxisName) -> MeshAxes:
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


def axes_by_path(mesh_axes: MeshAxes, names: Names) -> MeshAxes:
    """Find the mesh axes of each path that the argument mentions."""
    keys = match_all(mesh_axes, names.visible, what="axis_name", hidden=names.hidden)
    return {path: mesh_axes[key] for path, key in keys.items()}


def centralize_split(
    grad: Any, row: PlanRow, axes: tuple[str, ...] | None, *, strength: float, reproducible: bool
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
            return centralize(grad, layout=layout, strength=strength, reproducible=reproducible)
    if reproducible:
        check_whole(axes, path)
    try:
        return _jax.centralize_over_mesh(grad, layout.fan_in_axes(grad.ndim), strength, axes)
    except NameError as error:
        why = "It is for shard_map and pmap; leave it out under jit, where XLA communicates"
        raise ValueError(f"{path}: axis_name {axes} is not bound here. {why}") from error


def check_whole(axes: tuple[str, ...] | None, path: str) -> None:
    """Raise a TypeError if a fan-in is split, whose elements then have no known order."""
    if axes:
        raise TypeError(
            f"{path}: reproducible=True needs each fan-in whole on one device, and axis_name "
            f"splits this one over {axes}; split another axis of the weight"
        )
