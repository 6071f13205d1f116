"""Run somebody else's code, and keep its failure as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ["attempt"]

T = TypeVar("T")


def attempt(call: Callable[[], T]) -> tuple[T | None, str]:
    """Return the result and an empty text; or None and what was raised, on one line.

    >>> attempt(lambda: 1 + 1)
    (2, '')
    >>> attempt(lambda: 1 / 0)
    (None, 'ZeroDivisionError: division by zero')
    """
    try:
        return call(), ""
    except Exception as error:  # noqa: BLE001 - a broken library raises anything at all
        lines = str(error).splitlines() or [""]
        return None, f"{type(error).__name__}: {lines[0]}"
