"""Calls of `gcx.centralize_many` that repeat an earlier one, with other arrays in the same form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gcx._dispatch import repeating_backend
from gcx._layouts import Layouts
from gcx.layout import Layout
from gcx.plan import Plan


class Call:
    """A call with a flat list, tuple or dict, in place or for new results.

    If a backend knows such a call, nothing has to be checked again.
    """

    def __init__(self, grads: Any, layouts: Layouts, out: Any, reproducible: bool) -> None:
        self._kind = type(grads)
        self._names: tuple[Any, ...] = (*grads,) if self._kind is dict else ()
        self._leaves = [*grads.values()] if self._kind is dict else grads
        self._question = (layouts, reproducible, out is not None, self._names)
        is_simple = self._kind in (list, tuple, dict) and (out is None or out is grads)
        is_simple = is_simple and {*map(type, self._names)} <= {str}
        # A mapping or a list of layouts may change between calls.
        is_fixed = isinstance(layouts, (str, Layout, Plan))
        self._backend = repeating_backend(self._leaves) if is_simple and is_fixed else None

    def repeat(self, strength: float) -> Any:
        """Return the results; None if this call repeats no other."""
        if self._backend is None:
            return None
        results = self._backend.repeat(self._leaves, self._question, strength)
        if results is None or self._kind is list:
            return results
        return (
            tuple(results) if self._kind is tuple else dict(zip(self._names, results, strict=True))
        )

    def remember(self, axes: Sequence[tuple[int, ...]]) -> None:
        """Keep the fan-in axes of each array for the next call; none for an array left alone."""
        if self._backend is not None:
            self._backend.remember(self._leaves, self._question, axes)
