"""Mappings whose keys are names or globs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

__all__ = ["first_keys", "is_glob", "matches", "no_match"]

_GLOB = frozenset("*?[")


def first_keys(
    keys: Iterable[str], names: Iterable[str], *, what: str, complete: bool = True
) -> dict[str, str]:
    """Find the first key that matches each name; names without a key are left out.

    If `complete`, a key that matches no name is a ValueError; its message calls the mapping `what`.

    >>> first_keys(["a", "*/w"], ["a", "b/w", "c"], what="layouts")
    {'a': 'a', 'b/w': '*/w'}
    """
    keys, names = list(keys), list(names)
    for key in keys:
        if not isinstance(key, str):
            msg = f"{what}: a key is the name of a parameter or a glob, not {key!r}"
            raise TypeError(msg)
    found: dict[str, str] = {}
    unused = dict.fromkeys(keys)
    for name in names:
        matching = [key for key in keys if matches(key, name)]
        if matching:
            found[name] = matching[0]
        for key in matching:
            unused.pop(key, None)
    if unused and complete:
        raise ValueError(no_match(next(iter(unused)), names, what=what))
    return found


def matches(key: str, name: str) -> bool:
    """Return True if a key equals a name, or is a glob that matches it."""
    return key == name or (is_glob(key) and fnmatchcase(name, key))


def is_glob(key: str) -> bool:
    """Return True if a key is a glob."""
    return bool(_GLOB & set(key))


def no_match(key: str, names: Sequence[str], *, what: str) -> str:
    """Write the error for a key of the mapping `what` that matches none of the names."""
    shown = 10
    listed = ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
    return f"{what}: {key!r} matches no parameter; there are: {listed or '(none)'}"
