"""Gradients to compare: shapes with their fan-in written down by hand, numbers and strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from math import fsum
from typing import Any, NamedTuple

import numpy as np

from benchmarks.agreement.formats import Format
from gcx import _compat

__all__ = [
    "CASES",
    "CASES_WITH_FAN_IN",
    "Case",
    "Sample",
    "centralized",
    "draw",
    "keepdims",
    "samples",
    "unit_rows",
]


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
    Case((4096, 2, 17), "io...", (0, 2)),  # and along both, with output units between them
    Case((17, 2, 4096), "ioi", (0, 2)),
    Case((0, 4), "o...", (1,)),
    Case((), "o...", ()),
    Case((16,), "o...", ()),  # bias
    Case((16, 1), "o...", ()),  # fan-in of one
    Case((1, 16), "...o", ()),
    Case((4, 0), "o...", ()),
)


_LONG = 10_000


def draw(rng: np.random.Generator, case: Case, kind: Format) -> Any:
    """Random gradient that the format holds exactly, as float64 or complex128.

    Every output unit has a mean and a scale of its own, which shows if units are mixed up. In
    long sums the numbers are close to each other, which shows if rounding errors add up.
    """
    spread = 2.0**-10 if np.prod(case.shape) > _LONG else 1.0
    units = [1 if axis in case.fan_in else size for axis, size in enumerate(case.shape)]

    def normal() -> Any:
        scale = np.exp2(rng.integers(-2, 3, units))
        return scale * (spread * rng.normal(0, 1, case.shape) + rng.normal(0, 3, units))

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


# With those whose fan-in is cut into segments of 16384 elements.
CASES_WITH_FAN_IN = (
    *(case for case in CASES if case.fan_in),
    Case((2, 16_384), "o...", (1,)),
    Case((16_385, 2), "...o", (0,)),
    Case((2, 49_157), "o...", (1,)),
    Case((49_157, 2), "...o", (0,)),
)


class Sample(NamedTuple):
    """A gradient as float64, and how to lay it out in the memory of a library."""

    name: str
    values: Any
    lay_out: Callable[[Any, Callable[[Any], Any]], Any]  # of the values, with what makes an array


def samples(rng: np.random.Generator, case: Case, kind: Format) -> Iterator[Sample]:
    """Numbers of several kinds, each in several places."""
    for (numbers, draw_numbers), (memory, lay_out) in product(_NUMBERS.items(), _MEMORY.items()):
        values = draw_numbers(rng, case, kind)
        yield Sample(f"{case}, {numbers}, {memory}", values, lay_out)


def _close_to_the_mean(rng: np.random.Generator, case: Case, kind: Format) -> Any:
    """Many magnitudes, and in between their mean, of which the last bits alone are left over."""
    values = rng.normal(size=case.shape) * np.exp2(rng.integers(-10, 10, case.shape))
    is_mean = rng.random(case.shape) < 0.2
    others = np.maximum(np.sum(~is_mean, axis=case.fan_in, keepdims=True), 1)
    mean = np.sum(values, axis=case.fan_in, keepdims=True, where=~is_mean) / others
    return kind.round(np.where(is_mean, mean, values))


def _specials(rng: np.random.Generator, case: Case, _: Format) -> Any:
    """Zeros of both signs, and some infinities and NaN."""
    zeros = rng.choice([0.0, -0.0], size=case.shape)
    specials = rng.choice([np.inf, -np.inf, np.nan], size=case.shape)
    return np.where(rng.random(case.shape) < 0.01, specials, zeros)


_NUMBERS = {
    "random numbers": draw,
    "numbers close to their mean": _close_to_the_mean,
    "zeros, infinities and NaN": _specials,
}


def _in_order(values: Any, make: Callable[[Any], Any]) -> Any:
    return make(values)


def _in_reverse(values: Any, make: Callable[[Any], Any]) -> Any:
    stored = make(np.ascontiguousarray(values.transpose()))
    axes = tuple(reversed(range(values.ndim)))
    return _compat.array_namespace(stored).permute_dims(stored, axes)


def _with_gaps(values: Any, make: Callable[[Any], Any]) -> Any:
    return make(np.repeat(values, 2, axis=-1))[..., ::2]


_MEMORY = {"in order": _in_order, "axes in reverse": _in_reverse, "with gaps": _with_gaps}
