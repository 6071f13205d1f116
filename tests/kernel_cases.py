"""Gradients as they lie in memory, with the bits of their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import gcx

import canonical_order


class Case(NamedTuple):
    """A part of an array of this shape, to be centralized over these axes of the part."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    part: Callable[[Any], Any] = lambda whole: whole


ROWS = [
    Case((units, fan_in), (1,))
    for units, fan_in in (
        *((300, 2), (5, 3), (70, 9), (5, 64), (33, 147), (9, 255), (9, 257), (3, 576), (3, 1025)),
        *((2, 4095), (2, 4096), (3, 4608), (2, 14336), (1, 16384), (2, 16385), (1, 50000)),
        (1, 100),
    )
]
COLUMNS = [
    Case((fan_in, units), (0,))
    for fan_in, units in (
        *((2, 5), (9, 40), (27, 64), (128, 32), (147, 33), (257, 36), (1500, 33), (4608, 3)),
        *((16384, 8), (16385, 2)),
    )
]
OTHERS = {
    "stem": Case((64, 3, 7, 7), (1, 2, 3)),
    "all": Case((8, 9), (0, 1)),
    "rows in wider ones": Case((20, 300), (1,), lambda x: x[:, :256]),
    "every second element": Case((9, 300), (1,), lambda x: x[::3, ::2]),
    "reversed": Case((3, 300), (1,), lambda x: x[::-1, ::-1]),
    "reversed rows": Case((150, 40), (0,), lambda x: x[::-1, :33]),
    "misaligned rows": Case((1921,), (1,), lambda x: x[1:].reshape(30, 64)),
    "misaligned columns": Case((2051,), (0,), lambda x: x[3:].reshape(64, 32)),
    "HWIO": Case((3, 3, 16, 40), (0, 1, 2)),
    "columns in wider ones": Case((300, 100), (0,), lambda x: x[:, 8:72]),
    "turned columns": Case((40, 200), (0,), lambda x: x.T),
    "turned rows": Case((200, 40), (1,), lambda x: x.T),
    "io, in pieces": Case((16, 8, 3, 3), (0, 2, 3)),
    "fan-in of three pieces": Case((2, 3, 4, 2, 5), (0, 2, 4)),
    "experts of columns": Case((4, 50, 24), (1,)),
    "experts of rows": Case((3, 20, 64), (2,), lambda x: x[:, :10]),
    "channels last": Case((5, 3, 3, 40), (1, 2, 3), lambda x: x.transpose(0, 3, 1, 2)),
    "columns in runs": Case((6, 8, 64), (0, 1), lambda x: x[:, :5, :36]),
    "one of three axes": Case((8, 1, 6), (1, 2)),
}
ALL = [*ROWS, *COLUMNS, *OTHERS.values()]
SMALL = Case((6, 50), (1,))


def numbers(case: Case, dtype: str) -> Any:
    """Make an array of a case, with numbers of another kind in each output unit."""
    rng = np.random.default_rng(sum(case.shape))
    whole = rng.normal(size=case.shape).astype(dtype)
    part = case.part(whole)
    for k, unit in enumerate(canonical_order.output_units(part.shape, case.axes)):
        part[unit] = KINDS[k % len(KINDS)](rng.normal(size=part[unit].shape), dtype)
    return whole


def canonical(grad: Any, case: Case, strength: float = 1.0) -> Any:
    """Find the result by a reference that knows no tiles."""
    dtype = grad.dtype.name
    with np.errstate(all="ignore"):
        wide = np.asarray(grad).astype(canonical_order.working_dtype(dtype))
        return canonical_order.centralized(wide, case.axes, dtype, strength).astype(grad.dtype)


def centralize(
    grads: Sequence[Any],
    cases: Sequence[Case],
    outs: Sequence[Any] | None = None,
    strength: float = 1.0,
) -> list[Any]:
    """Centralize all at once, in the canonical order."""
    layouts = [
        "".join("i" if axis in case.axes else "o" for axis in range(grad.ndim))
        for grad, case in zip(grads, cases, strict=True)
    ]
    out = None if outs is None else list(outs)
    return gcx.centralize_many(
        list(grads), layouts=layouts, out=out, strength=strength, reproducible=True
    )


def of_all_sizes(x: Any, dtype: str) -> Any:
    return x * np.exp(8 * np.sin(np.arange(x.size).reshape(x.shape)))


def subnormal(x: Any, dtype: str) -> Any:
    return x * float(ml_dtypes.finfo(dtype).smallest_normal) / 8


def with_one(number: float) -> Callable[[Any, str], Any]:
    def kind(x: Any, dtype: str) -> Any:
        x.flat[x.size // 2] = number
        return x

    return kind


KINDS: list[Callable[[Any, str], Any]] = [
    lambda x, dtype: x,
    lambda x, dtype: 1.7 + x / 1000,
    of_all_sizes,
    lambda x, dtype: np.copysign(0.0, x),
    lambda x, dtype: np.full_like(x, -0.0),
    subnormal,
    with_one(np.nan),
    with_one(-np.inf),
]
