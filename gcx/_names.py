"""Names of parameters: nested containers of arrays, keys that are names or globs, and layouts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any

from gcx.layout import Layout, LayoutLike, as_layout
from gcx.plan import Plan

# The argument `layouts`.
Layouts = LayoutLike | Mapping[str, LayoutLike | None] | Sequence[Any] | Plan

_GLOB = frozenset("*?[")
_NAMES_SHOWN = 10


def match(
    keys: Iterable[str], names: Iterable[str], *, separator: str | None = None
) -> dict[str, str]:
    """Find the first key that equals or matches each name; leave out names without a key.

    A glob and a name have equally many separators, if one is given.
    """
    order = {key: k for k, key in enumerate(keys)}
    globs = [key for key in order if is_glob(key)]
    found = {}
    for name in names:
        candidates = [key for key in globs if _covers(key, name, separator)]
        if name in order:
            candidates.append(name)
        if candidates:
            found[name] = min(candidates, key=order.__getitem__)
    return found


def match_all(
    keys: Iterable[str], names: Iterable[str], *, what: str, hidden: Sequence[str] = ()
) -> dict[str, str]:
    """Match as `match` does; a key without a name is a ValueError that calls the keys `what`.

    At or below the paths `hidden` (``""``: anywhere), any key may be right.
    """
    keys, names = list(keys), list(names)
    known = set(names)
    for key in keys:
        if not isinstance(key, str):
            raise TypeError(f"{what}: a key is the name of a parameter or a glob, not {key!r}")
        if key not in known and not _may_match(key, hidden) and not match([key], names):
            raise ValueError(no_match(key, names, what=what))
    return match(keys, names)


def is_glob(key: str) -> bool:
    return not _GLOB.isdisjoint(key)


def no_match(key: str, names: Sequence[str], *, what: str) -> str:
    listed = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
    return f"{what}: {key!r} matches no parameter; there are: {listed or '(none)'}"


def _covers(glob: str, name: str, separator: str | None) -> bool:
    is_as_deep = separator is None or glob.count(separator) == name.count(separator)
    return is_as_deep and fnmatchcase(name, glob)


def _may_match(key: str, hidden: Iterable[str]) -> bool:
    return any(is_glob(key) or not path or f"{key}/".startswith(f"{path}/") for path in hidden)


def flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """List the path, joined by ``/``, and the value of each leaf."""
    parts = children(tree)
    if parts is None:
        return [(prefix, tree)]
    return [leaf for key, value in parts.items() for leaf in flatten(value, _join(prefix, key))]


def children(tree: Any) -> dict[Any, Any] | None:
    """Return the parts of a container by key or position; None for a leaf."""
    if isinstance(tree, dict):
        return tree
    return dict(enumerate(tree)) if isinstance(tree, (list, tuple)) else None


def _join(prefix: str, key: Any) -> str:
    return f"{prefix}/{key}" if prefix else str(key)


def rebuild(tree: Any, leaves: Iterable[Any]) -> Any:
    """Replace the leaves of a tree by others, in the order of `flatten`."""
    left = iter(leaves)
    if isinstance(tree, dict):
        parts = {key: rebuild(value, left) for key, value in tree.items()}
        if type(tree) is dict:  # torch.compile does not trace a copy
            return parts
        new = copy.copy(tree)  # keeps the attributes of a subclass of dict
        new.update(parts)
        return new
    if isinstance(tree, (list, tuple)):
        items = [rebuild(value, left) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return next(left)


def leaves_like(
    tree: Any, other: Any, *, what: str, like: str = "the gradients", prefix: str = ""
) -> list[Any]:
    """List the leaves of `other` in the order of `tree`; a ValueError unless they are alike."""
    mine, theirs = children(tree), children(other)
    if mine is None and theirs is None:
        return [other]
    if mine is None or theirs is None or mine.keys() != theirs.keys():
        differ = sorted(_join(prefix, key) for key in (mine or {}).keys() ^ (theirs or {}).keys())
        path = (differ or [prefix])[0]
        raise ValueError(f"{what} is not built like {like}: they differ in {path!r}")
    leaves = (
        leaves_like(part, theirs[key], what=what, like=like, prefix=_join(prefix, key))
        for key, part in mine.items()
    )
    return [leaf for part in leaves for leaf in part]


class naming(AbstractContextManager["naming"]):  # noqa: N801  # it is called like a function
    """Put the name of a leaf in front of a TypeError or ValueError from the ``with`` block."""

    def __init__(self, leaf: str) -> None:
        self.leaf = leaf

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, (TypeError, ValueError)):
            # type(error) may be a library's subclass with other arguments.
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{self.leaf}: {error}") from error


def layouts_for(
    named: Sequence[tuple[str, Any]], layouts: Layouts, *, like: Any
) -> list[Layout | None]:
    """Find the layouts of `named`, the leaves of the tree `like`; None leaves an array alone."""
    if isinstance(layouts, (Layout, str)):
        return [as_layout(layouts)] * len(named)
    if isinstance(layouts, Plan):
        return [_find_in_plan(layouts, name, array) for name, array in named]
    if isinstance(layouts, (list, tuple)):
        leaves = leaves_like(like, layouts, what="layouts")
        return [None if leaf is None else as_layout(leaf) for leaf in leaves]
    if not isinstance(layouts, Mapping):
        kind = type(layouts).__name__
        raise TypeError(f"layouts is a layout, list, tuple, mapping or plan, not {kind}")
    keys = match_all(layouts, [name for name, _ in named], what="layouts")
    parsed = {key: None if v is None else as_layout(v) for key, v in layouts.items()}
    for name, _ in named:
        if name not in keys:
            raise ValueError(f"layouts: no key matches {name!r}; '*': None leaves the rest alone")
    return [parsed[keys[name]] for name, _ in named]


def _find_in_plan(plan: Plan, name: str, array: Any) -> Layout | None:
    try:
        row = plan[name]
    except KeyError as error:
        raise ValueError(f"layouts: {error.args[0]}") from None
    shape = row.shape if array is None else tuple(array.shape)
    if shape != tuple(row.shape):
        with naming(name):
            raise ValueError(f"the plan is for shape {row.shape}, this array has shape {shape}")
    return row.layout
