"""Arrays of any rank and strides as matrices, which a kernel walks through."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

from gcx._memory import repeats_itself

Axes = tuple[int, ...]
# Size and step of an axis. A step is a stride in elements.
_Axis = tuple[int, int]

# Most units, elements of a fan-in, and elements of a step: the kernels count in 32 bits.
_MOST = 1 << 29
_MOST_MATRICES = 1 << 10  # of an array; more would not fit in a launch


class Matrix(NamedTuple):
    """Output units with one fan-in each; the first element is at `offset` in the array.

    In rows, the elements of a fan-in are neighbours in memory, and `step` leads from unit to unit.
    In columns, the units are neighbours, and `step` leads from one element of a fan-in to the next.
    """

    offset: int
    units: int
    fan_in: int
    step: int


class Walk(NamedTuple):
    """The matrices of an array, equal but for their offsets; `kind` is rows, columns or flat.

    A flat array is not centralized: one row holds all of it.
    """

    kind: str
    matrices: tuple[Matrix, ...]


@lru_cache(maxsize=1 << 12)
def find_walk(shape: Axes, steps: Axes, axes: Axes, *, any_order: bool) -> Walk | None:
    """See an array as matrices over its fan-in axes; None if the kernels cannot walk through it.

    `steps` are strides in elements. With `any_order` the fan-in may be walked in the order of
    memory, else it is walked in the order of the axes. An array without axes is flat.

    Weights (out, in) have one row for each output unit:

    >>> find_walk((5, 8), (8, 1), (1,), any_order=False)
    Walk(kind='rows', matrices=(Matrix(offset=0, units=5, fan_in=8, step=8),))
    """
    if 0 in shape or repeats_itself(shape, steps):
        return None
    if not axes:
        (size, step), *rest = _merge(_sort([*zip(shape, steps, strict=True)]))
        found = Walk("flat", (Matrix(0, 1, size, 0),))
        return found if not rest and step in (0, 1) and size <= _MOST else None
    fan_in = [(shape[axis], steps[axis]) for axis in axes]
    (size, step), *rest = _merge(_sort(fan_in) if any_order else fan_in)
    units = _merge(_sort([(shape[a], steps[a]) for a in range(len(shape)) if a not in axes]))
    # Rows are counted along the longest axis. Columns are neighbours along theirs.
    along = max(units) if step == 1 else units[-1]
    others = [axis for axis in units if axis is not along]
    largest = max(size, abs(step), along[0], abs(along[1]))
    if rest or (step != 1 and along[1] != 1) or largest > _MOST:
        return None
    if prod(count for count, _ in others) > _MOST_MATRICES:
        return None
    offsets = [0]
    for count, apart in others:
        offsets = [offset + k * apart for offset in offsets for k in range(count)]
    kind, step = ("rows", along[1]) if step == 1 else ("columns", step)
    return Walk(kind, tuple([Matrix(offset, along[0], size, step) for offset in offsets]))


def is_dense(shape: Sequence[int], steps: Sequence[int]) -> bool:
    """Return True if the elements fill one run of memory."""
    return find_walk(tuple(shape), tuple(steps), (), any_order=True) is not None


def _sort(axes: list[_Axis]) -> list[_Axis]:
    return sorted(axes, key=lambda axis: abs(axis[1]), reverse=True)


def _merge(axes: Sequence[_Axis]) -> list[_Axis]:
    """Join neighbouring axes if one equal step leads through both."""
    merged: list[_Axis] = []
    for size, step in axes:
        if merged and merged[-1][1] == size * step:
            before, _ = merged.pop()
            merged.append((before * size, step))
        elif size > 1:
            merged.append((size, step))
    return merged or [(1, 0)]
