"""Whether equal bits can be promised for parameters."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import optax

from gcx._dispatch import backend_for
from gcx._tree import naming
from gcx.backends import _canonical
from gcx.optax._layers._names import named_leaves
from gcx.optax._mesh_axes import check_whole
from gcx.plan import Plan


def check_reproducible(
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
