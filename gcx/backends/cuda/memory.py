"""Arrays that overlap in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import repeat
from math import inf
from operator import is_not
from typing import Any

# Addresses of the first byte of an array and of the first byte behind it.
Span = tuple[float, float]


@lru_cache(maxsize=1 << 12)
def extent(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Find the first byte of an array and the end of its last, from the address of element 0."""
    if 0 in shape:
        return 0, 0
    reaches = [stride * (size - 1) for size, stride in zip(shape, strides, strict=True)]
    return sum(min(r, 0) for r in reaches), sum(max(r, 0) for r in reaches) + itemsize


def writes_conflict(
    arrays: Sequence[Any], outs: Sequence[Any], find_span: Callable[[Any], Span]
) -> bool:
    """Return True if a result may overwrite another array of the list.

    An `out` of None is a new array, which shares no memory.
    """
    if not any(map(is_not, outs, repeat(None))):
        return False
    end = end_of_written = -inf
    for start, stop, is_written in sorted(_uses(arrays, outs, find_span)):
        if start < (end if is_written else end_of_written):
            return True
        end = max(end, stop)
        end_of_written = max(end_of_written, stop) if is_written else end_of_written
    return False


def _uses(
    arrays: Sequence[Any], outs: Sequence[Any], find_span: Callable[[Any], Span]
) -> Iterator[tuple[float, float, bool]]:
    """List the memory that is read or written, and whether it is written."""
    for array, out in zip(arrays, outs, strict=True):
        read = find_span(array)
        written = read if out is array else None if out is None else find_span(out)
        for span, is_written in ((read, False), (written, True)):
            if span is not None and span[0] < span[1] and (is_written or span != written):
                yield *span, is_written
