"""Old name of `gcx._names`."""

from collections.abc import Iterable

from gcx._names import is_glob, match, match_all, no_match

__all__ = ["first_keys", "is_glob", "matches", "no_match"]


def matches(key: str, name: str) -> bool:
    """Return True if a key equals a name or matches it."""
    return bool(match([key], [name]))


def first_keys(
    keys: Iterable[str], names: Iterable[str], *, what: str, complete: bool = True
) -> dict[str, str]:
    """Match as `gcx._names.match_all` does; if not `complete`, any name may be hidden."""
    return match_all(keys, names, what=what, hidden=() if complete else [""])
