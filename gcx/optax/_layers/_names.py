"""How the leaves of a tree are called: the keys on the way to them, joined by ``/``."""

from __future__ import annotations

from typing import Any

import jax


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Name and value of each leaf, in the order of `jax.tree.leaves`; None is a leaf too."""
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)
    return [(name_of(path), leaf) for path, leaf in paths_and_leaves]


def is_none(node: object) -> bool:
    """Whether a node is None, which JAX would pass over."""
    return node is None


def name_of(path: tuple[Any, ...]) -> str:
    """Keys of a path joined by ``/``, without the ``.value`` by which Flax boxes hold an array."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return "/".join(map(_key_text, path))


def _key_text(key: object) -> str:
    # Those of DictKey and FlattenedIndexKey, GetAttrKey, SequenceKey; other keys are what they are.
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
