"""Gradients of many fan-ins, kinds of numbers and places in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.agreement.canonical import centralized
from benchmarks.agreement.formats import Format
from benchmarks.agreement.gradients import Case, Sample, draw, samples
from gcx import _compat

__all__ = ["FAN_INS", "Subject", "subjects"]

# Two elements; odd and even ones; a row of several warps; a segment and one more; a large image.
FAN_INS = (2, 9, 144, 147, 4608, 14_336, 16_384, 16_385, 150_528)
_ELEMENTS = 60_000  # most of a gradient, if it has more than three units


class Subject(NamedTuple):
    """A gradient, and the expected result: in canonical order, to the last bit."""

    case: Case
    sample: Sample
    expected: Any


def subjects(kind: Format, fan_in: int) -> Iterator[Subject]:
    """All gradients of one fan-in and dtype."""
    rng = np.random.default_rng(fan_in)
    with np.errstate(invalid="ignore"):  # of the infinities among the numbers
        for case in _cases(fan_in):
            for sample in (*samples(rng, case, kind), *_elsewhere(rng, case, kind)):
                yield Subject(case, sample, centralized(sample.values, case.fan_in, kind))


def _cases(fan_in: int) -> Iterator[Case]:
    units = max(3, min(37, _ELEMENTS // fan_in))
    yield Case((units, fan_in), "o...", (1,))
    yield Case((fan_in, units), "...o", (0,))
    if fan_in < 8 * _ELEMENTS // 3:
        yield Case((fan_in, 8), "...o", (0,))  # 16 bytes, or a multiple, in each dtype
    inputs, rest = divmod(fan_in, 9)
    if not rest:
        yield Case((units, inputs, 3, 3), "o...", (1, 2, 3))
        yield Case((3, 3, inputs, units), "...o", (0, 1, 2))
        yield Case((inputs, units, 3, 3), "io...", (0, 2, 3))


def _elsewhere(rng: np.random.Generator, case: Case, kind: Format) -> Iterator[Sample]:
    for place, lay_out in _PLACES.items():
        yield Sample(f"{case}, {place}", draw(rng, case, kind), lay_out)


def _off_by_one(values: Any, make: Callable[[Any], Any]) -> Any:
    """Begin at an address that wide accesses cannot begin at."""
    stored = make(np.concatenate([[0.0], values.ravel()]))
    return _compat.array_namespace(stored).reshape(stored[1:], values.shape)


def _rows_apart(values: Any, make: Callable[[Any], Any]) -> Any:
    wider = np.zeros((*values.shape[:-1], values.shape[-1] + 3))
    wider[..., :-3] = values
    return make(wider)[..., :-3]


def _channels_last(values: Any, make: Callable[[Any], Any]) -> Any:
    stored = make(np.ascontiguousarray(np.moveaxis(values, 1, -1)))
    last = values.ndim - 1
    return _compat.array_namespace(stored).permute_dims(stored, (0, last, *range(1, last)))


_PLACES = {
    "off by one": _off_by_one,
    "rows apart": _rows_apart,
    "channels last": _channels_last,
}
