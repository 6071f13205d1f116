"""The memory of arrays: from where to where, and whether elements share an address."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

# Address of the first byte, address behind the last, owner, array, and True if it is written to.
Use = tuple[int, int, int, Any, bool]


def span(start: int, shape: Sequence[int], steps: Sequence[int], itemsize: int) -> tuple[int, int]:
    """Find the addresses of the first byte and behind the last; the steps are in bytes."""
    if 0 in shape:
        return start, start
    reaches = [step * (size - 1) for size, step in zip(shape, steps, strict=True)]
    low = sum(reach for reach in reaches if reach < 0)
    return start + low, start + sum(reaches) - low + itemsize


def repeats_itself(shape: Sequence[int], strides: Sequence[int], itemsize: int = 1) -> bool:
    """Return True if elements may share an address; False for every ordinary view."""
    if 0 in shape:
        return False
    reach = itemsize
    for step, size in sorted(zip(map(abs, strides), shape, strict=True)):
        if size > 1 and step < reach:
            return True
        reach += step * (size - 1)
    return False


def find_meetings(uses: Sequence[Use]) -> Iterator[tuple[Use, Use]]:
    """List the pairs of overlapping spans with different owners, if at least one is written to."""
    open_uses: list[Use] = []
    for use in sorted(uses, key=lambda use: use[:2]):
        open_uses = [other for other in open_uses if other[1] > use[0]]
        for other in open_uses:
            if other[2] != use[2] and (use[4] or other[4]):
                yield other, use
        if use[0] < use[1]:
            open_uses.append(use)
