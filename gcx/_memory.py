"""The memory of arrays: whether elements of one or of several have an address in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from operator import add, gt
from typing import NamedTuple


class Memory(NamedTuple):
    start: int  # the address of the first element
    shape: Sequence[int] = ()
    steps: Sequence[int] = ()  # along each axis, in bytes
    itemsize: int = 1


# Memory, its owner, and True if it is written to.
Use = tuple[Memory, int, bool]


def find_span(memory: Memory) -> tuple[int, int]:
    """Find the lowest address of a byte, and the address behind the highest."""
    start, shape, steps, itemsize = memory
    if 0 in shape:
        return start, start
    reaches = [step * (size - 1) for size, step in zip(shape, steps, strict=True)]
    low = sum(reach for reach in reaches if reach < 0)
    return start + low, start + sum(reaches) - low + itemsize


def repeats_itself(shape: Sequence[int], steps: Sequence[int], itemsize: int = 1) -> bool:
    """Return True if elements may share an address; False for every ordinary view."""
    if 0 in shape:
        return False
    reach = itemsize
    for step, size in sorted(zip(map(abs, steps), shape, strict=True)):
        if size > 1 and step < reach:
            return True
        reach += step * (size - 1)
    return False


def overlap(starts: Sequence[int], sizes: Iterable[int]) -> bool:
    """Return True if two runs of bytes, which begin at `starts`, overlap."""
    return any(map(gt, sorted(map(add, starts, sizes)), sorted(starts)[1:]))  # ends and starts


def find_shared(uses: Sequence[Use]) -> Iterator[tuple[int, int]]:
    """Find pairs of owners who share bytes, if one of them writes there."""
    spans = [find_span(memory) for memory, _, _ in uses]
    if not overlap([start for start, _ in spans], [end - start for start, end in spans]):
        return  # the usual case, and quick
    reached: list[int] = []  # uses that end behind the start of the next one
    for k in sorted(range(len(uses)), key=lambda k: spans[k]):
        start, end = spans[k]
        memory, owner, is_written = uses[k]
        reached = [n for n in reached if spans[n][1] > start]
        for other, its_owner, is_written_too in [uses[n] for n in reached]:
            is_conflict = owner != its_owner and (is_written or is_written_too)
            if is_conflict and (memory == other or _share(memory, other)):
                yield its_owner, owner
        if start < end:
            reached.append(k)


def _share(one: Memory, other: Memory) -> bool:
    """Mark the bytes of one in a map of both, and look for marks among the other's."""
    spans = find_span(one), find_span(other)
    low = min(spans)[0]
    marks = bytearray(max(end for _, end in spans) - low)
    for run in _cut_runs(one, low):
        marks[run] = b"\1" * len(marks[run])
    return any(1 in marks[run] for run in _cut_runs(other, low))


def _cut_runs(memory: Memory, low: int) -> Iterator[slice]:
    """List the bytes in a map that begins at `low`; each slice is along the longest axis."""
    first, end = find_span(memory)
    if first == end:
        return
    axes = [(size, abs(step)) for size, step in zip(memory.shape, memory.steps, strict=True)]
    *others, (size, step) = sorted([(memory.itemsize, 1), *(axis for axis in axes if axis[1])])
    for place in product(*[range(0, count * apart, apart) for count, apart in others]):
        start = first - low + sum(place)
        yield slice(start, start + step * (size - 1) + 1, step)
