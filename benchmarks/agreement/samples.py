"""Gradients that show in which order they were summed, and ways for them to lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from benchmarks.agreement.formats import Format
from benchmarks.agreement.gradients import CASES, Case, draw
from gcx import _compat

__all__ = ["CASES_WITH_FAN_IN", "Sample", "samples"]

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
