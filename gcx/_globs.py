"""Mappings whose keys are names or globs."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

__all__ = ["first_keys"]

_GLOB = frozenset("*?[")  # what makes a key more than a name


def first_keys(
    keys: Iterable[str], names: Iterable[str], *, what: str, complete: bool = True
) -> dict[str, str]:
    """Give each name the first key that is or matches it; names that none matches are left out.

    A key that matches no name is a ValueError which calls the mapping by the name `what`, unless
    part of the names is hidden from view (not `complete`).

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
        matching = [key for key in keys if _matches(key, name)]
        if matching:
            found[name] = matching[0]
        for key in matching:
            unused.pop(key, None)
    if unused and complete:
        shown = 10
        listed = ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
        msg = (
            f"{what}: {next(iter(unused))!r} matches no parameter; there are: {listed or '(none)'}"
        )
        raise ValueError(msg)
    return found


def _matches(key: str, name: str) -> bool:
    return key == name or (bool(_GLOB & set(key)) and fnmatchcase(name, key))
