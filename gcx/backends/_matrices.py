"""Arrays of any rank and strides, seen as the matrices that a kernel walks through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

__all__ = ["Matrix", "matrices"]

# Size and step of an axis; steps are distances in memory, in elements.
_Axis = tuple[int, int]


class Matrix(NamedTuple):
    """Output units with one fan-in each, at equal distances in the memory of an array.

    Element k of the fan-in of unit u is `place(u, k)` elements behind the start of the array. The
    fan-in is made of runs: `inner` elements `inner_step` apart, each run `outer_step` behind the
    one before. One run holds all of it where it can be walked in equal steps.
    """

    offset: int
    units: int
    unit_step: int
    fan_in: int
    inner: int
    inner_step: int
    outer_step: int

    def place(self, unit: int, element: int) -> int:
        """Where an element is, counted from the start of the array."""
        run, within = divmod(element, self.inner)
        fan_in_place = run * self.outer_step + within * self.inner_step
        return self.offset + unit * self.unit_step + fan_in_place

    @property
    def is_rows(self) -> bool:
        """Whether the elements of a fan-in are neighbours in memory."""
        return self.inner == self.fan_in and self.inner_step == 1

    @property
    def is_columns(self) -> bool:
        """Whether neighbours in memory belong to neighbouring units, at one step of the fan-in."""
        return not self.is_rows and self.inner == self.fan_in and self.unit_step == 1


def matrices(
    shape: Sequence[int], steps: Sequence[int], axes: Sequence[int], *, any_order: bool = False
) -> tuple[Matrix, ...] | None:
    """Take an array with elements apart into as few matrices as there can be.

    Parameters
    ----------
    shape, steps : sequence of int
        Sizes of the axes, none of them 0, and distances in memory along them, in elements.
    axes : sequence of int
        The fan-in axes.
    any_order : bool, optional
        Whether the fan-in may be walked in the order of memory; else in that of the axes.

    Returns
    -------
    tuple of Matrix or None
        None if the fan-in is made of more than runs of equal steps.

    Examples
    --------
    Weights (out, in) have one row for each output unit:

    >>> matrices((5, 8), (8, 1), (1,))
    (Matrix(offset=0, units=5, unit_step=8, fan_in=8, inner=8, inner_step=1, outer_step=0),)

    Experts (expert, in, out) have a matrix each, whose columns are the units:

    >>> [matrix.offset for matrix in matrices((3, 8, 5), (40, 5, 1), (1,))]
    [0, 40, 80]
    """
    fan_in = [(shape[a], steps[a]) for a in axes]
    if any_order:
        fan_in.sort(key=_step, reverse=True)
    fan_in = _merged(fan_in)
    if len(fan_in) > 2:
        return None
    (runs, outer_step), (inner, inner_step) = fan_in if len(fan_in) == 2 else ((1, 0), *fan_in)
    units = [(shape[a], steps[a]) for a in range(len(shape)) if a not in axes]
    units = _merged(sorted(units, key=_step, reverse=True))
    # Neighbours in memory, if units are neighbours; else as many units in a matrix as there can be.
    along = min(units, key=lambda axis: (abs(axis[1]) != 1, -axis[0]), default=(1, 0))
    rest = [axis for axis in units if axis is not along]
    return tuple(
        Matrix(offset, *along, runs * inner, inner, inner_step, outer_step)
        for offset in _offsets(rest)
    )


def _step(axis: _Axis) -> int:
    return abs(axis[1])


def _merged(axes: Sequence[_Axis]) -> list[_Axis]:
    """Join neighbouring axes, where going on along the first is going on along the second."""
    merged: list[_Axis] = []
    for size, step in axes:
        if merged and merged[-1][1] == size * step:
            before, _ = merged.pop()
            merged.append((before * size, step))
        elif size > 1:
            merged.append((size, step))
    return merged or [(1, 0)]


def _offsets(axes: Sequence[_Axis]) -> Iterator[int]:
    for position in product(*(range(size) for size, _ in axes)):
        yield sum(k * step for k, (_, step) in zip(position, axes, strict=True))
