"""Arrays of any rank and strides as matrices, which a kernel walks through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

# Size and step of an axis. A step is a stride in elements.
_Axis = tuple[int, int]


class Matrix(NamedTuple):
    """Output units at equal distances in memory, with one fan-in each.

    Element k in the fan-in of unit u is `place(u, k)` elements behind the start of the array. The
    fan-in consists of runs: `inner` elements `inner_step` apart. Each run starts `outer_step` after
    the one before. A fan-in of equal steps is one run.
    """

    offset: int
    units: int
    unit_step: int
    fan_in: int
    inner: int
    inner_step: int
    outer_step: int

    def place(self, unit: int, element: int) -> int:
        """Return the offset of an element from the start of the array."""
        run, within = divmod(element, self.inner)
        fan_in_place = run * self.outer_step + within * self.inner_step
        return self.offset + unit * self.unit_step + fan_in_place

    @property
    def is_rows(self) -> bool:
        """True if the elements of a fan-in are neighbours in memory."""
        return self.inner == self.fan_in and self.inner_step == 1

    @property
    def is_columns(self) -> bool:
        """True if the units are neighbours in memory, for each element of the fan-in."""
        return not self.is_rows and self.inner == self.fan_in and self.unit_step == 1


def matrices(
    shape: Sequence[int], steps: Sequence[int], axes: Sequence[int], *, any_order: bool = False
) -> tuple[Matrix, ...] | None:
    """Describe an array without overlapping elements by as few matrices as possible.

    `steps` are strides in elements. With `any_order` the fan-in may be walked in the order of
    memory, else it is walked in the order of the axes. None if it does not consist of equal runs.

    Weights (out, in) have one row for each output unit:

    >>> matrices((5, 8), (8, 1), (1,))
    (Matrix(offset=0, units=5, unit_step=8, fan_in=8, inner=8, inner_step=1, outer_step=0),)
    """
    fan_in = [(shape[a], steps[a]) for a in axes]
    if any_order:
        fan_in.sort(key=_step, reverse=True)
    fan_in = _merge(fan_in)
    if len(fan_in) > 2:
        return None
    (runs, outer_step), (inner, inner_step) = fan_in if len(fan_in) == 2 else ((1, 0), *fan_in)
    units = [(shape[a], steps[a]) for a in range(len(shape)) if a not in axes]
    units = _merge(sorted(units, key=_step, reverse=True))
    # A matrix takes the axis whose units are neighbours in memory, or else the longest axis.
    along = min(units, key=lambda axis: (abs(axis[1]) != 1, -axis[0]), default=(1, 0))
    rest = [axis for axis in units if axis is not along]
    return tuple(
        Matrix(offset, *along, runs * inner, inner, inner_step, outer_step)
        for offset in _find_offsets(rest)
    )


def _step(axis: _Axis) -> int:
    return abs(axis[1])


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


def _find_offsets(axes: Sequence[_Axis]) -> Iterator[int]:
    for position in product(*(range(size) for size, _ in axes)):
        yield sum(k * step for k, (_, step) in zip(position, axes, strict=True))
