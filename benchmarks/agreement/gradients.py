"""Gradients to check with: shapes whose fan-in is written down by hand, and exact answers."""

from __future__ import annotations

from math import fsum
from typing import Any, NamedTuple

import numpy as np

from benchmarks.agreement.formats import Format

__all__ = ["CASES", "Case", "centralized", "draw", "keepdims", "unit_rows"]


class Case(NamedTuple):
    """A weight; `fan_in` is stated, not derived from the layout, since that is under test.

    No fan-in means that the operator must hand the gradient back as it is.
    """

    shape: tuple[int, ...]
    layout: str
    fan_in: tuple[int, ...]

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape)) or 'scalar'} {self.layout!r}"


CASES = (
    Case((32, 64), "o...", (1,)),
    Case((64, 32), "...o", (0,)),
    Case((5, 3), "o...", (1,)),
    Case((7, 2), "...o", (0,)),
    Case((1, 300), "o...", (1,)),
    Case((16, 8, 3, 3), "o...", (1, 2, 3)),  # convolution in torch
    Case((3, 3, 8, 16), "...o", (0, 1, 2)),  # convolution in JAX and Keras
    Case((8, 16, 3, 3), "io...", (0, 2, 3)),  # transposed convolution in torch
    Case((16, 1, 3, 3), "o...", (1, 2, 3)),  # depthwise convolution
    Case((4, 2, 3, 3, 3), "o...", (1, 2, 3, 4)),
    Case((12, 4, 8), "ioo", (0,)),  # attention query in Flax
    Case((4, 8, 12), "iio", (0, 1)),  # attention output in Flax
    Case((4, 16, 8), "oio", (1,)),  # stacked experts
    Case((100,), "i", (0,)),
    Case((3, 9001), "o...", (1,)),  # long sums, along a row
    Case((9001, 3), "...o", (0,)),  # and down a column
    Case((0, 4), "o...", (1,)),
    Case((), "o...", ()),
    Case((16,), "o...", ()),  # bias
    Case((16, 1), "o...", ()),  # fan-in of one
    Case((1, 16), "...o", ()),
    Case((4, 0), "o...", ()),
)


def draw(rng: np.random.Generator, case: Case, kind: Format) -> Any:
    """Random gradient that the format holds exactly, as float64 or complex128.

    Every output unit has a mean and a scale of its own, which shows if units are mixed up.
    """
    units = [1 if axis in case.fan_in else size for axis, size in enumerate(case.shape)]

    def normal() -> Any:
        scale = np.exp2(rng.integers(-2, 3, units))
        return scale * (rng.normal(0, 1, case.shape) + rng.normal(0, 3, units))

    return kind.round(normal() + 1j * normal() if kind.is_complex else normal())


def centralized(values: Any, fan_in: tuple[int, ...]) -> Any:
    """``values - mean(values)`` with exactly rounded sums, one output unit after the other."""
    if not fan_in:
        return values
    units = unit_rows(values, fan_in)
    means = np.array([_mean(unit) for unit in units], complex)
    if not np.iscomplexobj(values):
        means = means.real
    return values - means.reshape(keepdims(values.shape, fan_in))


def unit_rows(values: Any, fan_in: tuple[int, ...]) -> Any:
    """Make a row of each output unit, with its fan-in in the order of the axes."""
    first = np.moveaxis(values, fan_in, range(-len(fan_in), 0))
    fan_in_size = int(np.prod([values.shape[axis] for axis in fan_in]))
    return first.reshape(-1, fan_in_size)


def keepdims(shape: tuple[int, ...], fan_in: tuple[int, ...]) -> list[int]:
    """Shape of what there is one of for each output unit."""
    return [1 if axis in fan_in else size for axis, size in enumerate(shape)]


def _mean(unit: Any) -> complex:
    return complex(fsum(unit.real) / unit.size, fsum(unit.imag) / unit.size)
