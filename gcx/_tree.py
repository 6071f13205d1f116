"""Nested lists, tuples and dicts of arrays: their names and leaves."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["flatten", "leaves_like", "naming", "rebuild"]

TreeT = TypeVar("TreeT")


def flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """List the name and the value of each leaf; a name is the path, joined by ``/``.

    >>> flatten({"a": [1, 2], "b": 3})
    [('a/0', 1), ('a/1', 2), ('b', 3)]
    """
    children = _children(tree)
    if children is None:
        return [(prefix, tree)]
    nested = (flatten(value, _join(prefix, key)) for key, value in children.items())
    return [leaf for leaves in nested for leaf in leaves]


def _children(tree: Any) -> dict[Any, Any] | None:
    """Return the parts of a container by key or position; None for a leaf."""
    if isinstance(tree, dict):
        return tree
    return dict(enumerate(tree)) if isinstance(tree, (list, tuple)) else None


def _join(prefix: str, key: Any) -> str:
    return f"{prefix}/{key}" if prefix else str(key)


def rebuild(tree: TreeT, leaves: Iterable[Any]) -> TreeT:
    """Replace the leaves of a tree by others, in the order of `flatten`.

    >>> rebuild({"a": [1, 2], "b": 3}, "xyz")
    {'a': ['x', 'y'], 'b': 'z'}
    """
    return _rebuild(tree, iter(leaves))  # type: ignore[no-any-return]


def _rebuild(tree: Any, leaves: Iterator[Any]) -> Any:
    if isinstance(tree, dict):
        parts = {key: _rebuild(value, leaves) for key, value in tree.items()}
        if type(tree) is dict:
            return parts
        new = copy.copy(tree)  # keeps the attributes of a subclass of dict
        new.update(parts)
        return new
    if isinstance(tree, (list, tuple)):
        items = [_rebuild(value, leaves) for value in tree]
        is_named = hasattr(tree, "_fields")
        return type(tree)(*items) if is_named else type(tree)(items)
    return next(leaves)


def leaves_like(
    tree: Any, other: Any, *, what: str, like: str = "the gradients", prefix: str = ""
) -> list[Any]:
    """List the leaves of `other`, which must be built like `tree`, in the order of `tree`.

    Raises
    ------
    ValueError
        If it is not. The message calls the trees `what` and `like`, and shows the first difference.
    """
    mine, theirs = _children(tree), _children(other)
    if mine is None and theirs is None:
        return [other]
    if mine is None or theirs is None or mine.keys() != theirs.keys():
        differ = sorted(_join(prefix, key) for key in (mine or {}).keys() ^ (theirs or {}).keys())
        msg = f"{what} is not built like {like}: they differ in {(differ or [prefix])[0]!r}"
        raise ValueError(msg)
    leaves = (
        leaves_like(part, theirs[key], what=what, like=like, prefix=_join(prefix, key))
        for key, part in mine.items()
    )
    return [leaf for part in leaves for leaf in part]


@contextmanager
def naming(leaf: str) -> Iterator[None]:
    """Put the name of a leaf in front of a TypeError or ValueError from the ``with`` block.

    >>> with naming("encoder/0"):
    ...     raise ValueError("wrong")
    Traceback (most recent call last):
        ...
    ValueError: encoder/0: wrong
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        # type(error) may be a library's subclass with other arguments.
        kind = TypeError if isinstance(error, TypeError) else ValueError
        msg = f"{leaf}: {error}"
        raise kind(msg) from error
