"""Names of the leaves of a tree: their keys joined by ``/``."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from jax.tree_util import GetAttrKey, keystr, tree_leaves_with_path
from optax import MaskedNode

# Types that hold an array as their ``value``. By name, since Flax need not be installed.
_BOXES = ("flax.core.*.AxisMetadata", "flax.nnx.*.Variable", "flax.nnx.*.VariableState")
_VALUE = (GetAttrKey("value"),)


def is_none(node: object) -> bool:
    """Return True for None, which JAX does not count as a leaf."""
    return node is None


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] = is_none) -> list[tuple[str, Any]]:
    """List the name, without the ``value`` of Flax boxes, and the value of each leaf and None."""
    nodes = tree_leaves_with_path(tree, is_leaf=lambda node: is_leaf(node) or _is_box(node))
    return [
        (name_of(path + (inside[1:] if inside[:1] == _VALUE else inside)), leaf)
        for path, node in nodes
        for inside, leaf in tree_leaves_with_path(node, is_leaf=is_leaf)
    ]


class Names(NamedTuple):
    visible: list[str]
    hidden: list[str]  # paths at or below which there may be further leaves


def names_of(tree: Any) -> Names:
    """Find the names in a tree, and the paths that `optax.masked` and its kin have hidden."""
    leaves = named_leaves(tree, is_leaf=lambda node: is_none(node) or isinstance(node, MaskedNode))
    visible = [name for name, leaf in leaves if not isinstance(leaf, MaskedNode)]
    hidden = [name for name, leaf in leaves if isinstance(leaf, MaskedNode)]
    return Names(visible, hidden if leaves else [""])  # `optax.tree_map_params` passes none


def name_of(path: tuple[Any, ...]) -> str:
    return keystr(path, simple=True, separator="/")


def _is_box(node: object) -> bool:
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(node).__mro__]
    return any(fnmatchcase(kind, box) for kind in kinds for box in _BOXES)
