"""A progress bar on stderr, for people who watch; nothing where nobody does."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

__all__ = ["track"]

T = TypeVar("T")

_WIDTH = 30
_START_OF_CLEARED_LINE = "\r\x1b[K"


def track(items: Sequence[T], label: str) -> Iterator[T]:
    """Hand out `items`, and draw how many have been dealt with.

    The bar is drawn only on a terminal, and leaves nothing behind.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    try:
        for done, item in enumerate(items):
            _draw(_bar(label, done, len(items)))
            yield item
    finally:
        _draw("")


def _bar(label: str, done: int, total: int) -> str:
    filled = _WIDTH * done // total
    return f"{label} [{'#' * filled}{' ' * (_WIDTH - filled)}] {done}/{total}"


def _draw(line: str) -> None:
    print(_START_OF_CLEARED_LINE + line, end="", file=sys.stderr, flush=True)
