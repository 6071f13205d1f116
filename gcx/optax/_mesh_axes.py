"""Fan-ins that mesh axes split, inside `jax.shard_map` and `jax.pmap`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gcx._centralize import centralize
from gcx._names import match_all, naming
from gcx.backends import _jax
from gcx.optax._names import Names
from gcx.plan import PlanRow

_Names = str | tuple[str, ...]
AxisName = _Names | Mapping[str, _Names | None] | None


def check_names(axis_name: object) -> None:
    for names in axis_name.values() if isinstance(axis_name, Mapping) else (axis_name,):
        together = names if isinstance(names, tuple) else (names,)
        if names is not None and not all(isinstance(name, str) for name in together):
            raise TypeError(
                f"axis_name is a mesh axis, a tuple, None, or a mapping to these, not {names!r}"
            )


def axes_by_path(axis_name: AxisName, names: Names) -> dict[str, tuple[str, ...]]:
    """Find the mesh axes of the paths that `axis_name` mentions: ``()`` if the fan-in is whole."""
    if axis_name is None:
        return {}
    if not isinstance(axis_name, Mapping):
        return dict.fromkeys(names.visible, _as_tuple(axis_name))
    keys = match_all(axis_name, names.visible, what="axis_name", hidden=names.hidden)
    return {path: _as_tuple(axis_name[key]) for path, key in keys.items()}


def centralize_split(
    grad: Any, row: PlanRow, axes: tuple[str, ...] | None, *, strength: float, reproducible: bool
) -> Any:
    """Centralize a gradient whose fan-in is split over these mesh axes (None: not known)."""
    path, _, layout, _ = row
    if layout is None:
        return grad
    for axis in sorted(_jax.varying_axes(grad)) if axes is None else ():
        raise ValueError(
            f"{path}: this gradient differs along the mesh axis {axis!r}, and its fan-in may be "
            f"split over it. If it is, give axis_name={{{path!r}: {axis!r}}}; if each device holds "
            f"a whole fan-in, axis_name={{{path!r}: None}}"
        )
    if axes is not None and layout.is_split and (axes or _jax.varying_axes(grad)):
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


def _as_tuple(names: _Names | None) -> tuple[str, ...]:
    if isinstance(names, tuple):
        return names
    return () if names is None else (names,)
