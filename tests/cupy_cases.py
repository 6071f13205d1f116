"""Gradients as they lie in memory, and what the kernel for CuPy must make of them."""

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


# For each number of threads that may share a row, and more than a tile of them.
ROWS = [
    Case((units, fan_in), (1,))
    for units, fan_in in (
        *((300, 2), (70, 9), (5, 64), (33, 147), (9, 255), (9, 257), (3, 576), (2, 1000)),
        *((5, 1024), (2, 4095), (3, 4608), (2, 14336), (1, 16384), (2, 16385), (1, 40000)),
    )
]
# In one tile, in several, in several segments; panels that are full and others.
COLUMNS = [
    Case((fan_in, units), (0,))
    for fan_in, units in ((2, 5), (9, 40), (128, 32), (147, 33), (257, 36), (4608, 3))
]
LONG_COLUMNS = [Case((16384, 8), (0,)), Case((16385, 2), (0,)), Case((40000, 2), (0,))]
OTHERS = [
    Case((4, 6, 3, 3), (0, 2, 3)),  # a transposed convolution: runs of 9
    Case((6, 3, 3, 5), (1, 2, 3), lambda x: x.transpose(0, 3, 1, 2)),  # channels_last
    Case((3, 200, 40), (1,)),  # experts: a matrix each
    Case((2, 640), (1,), lambda x: x[:, :600]),  # longer steps
    Case((9, 300), (1,), lambda x: x[::3, ::2]),
    Case((3, 300), (1,), lambda x: x[::-1, ::-1]),
    Case((3, 601), (1,), lambda x: x.ravel()[3:].reshape(3, 600)),  # packs, but not aligned
    Case((150, 40), (0,), lambda x: x[::-1, :33]),
    Case((6, 8, 64), (0, 1), lambda x: x[:, :5, :36]),  # columns in runs
    Case((2, 3, 4, 2, 5), (0, 2, 4)),  # more than runs: through a copy
    Case((8, 1, 6), (1, 2)),
    Case((1, 5000), (1,)),
]
# Of every kind a small one, for checks that take long.
FEW = [
    *(Case(shape, (1,)) for shape in ((70, 9), (9, 250), (3, 600), (2, 4608), (2, 16500))),
    *(Case(shape, (0,)) for shape in ((300, 40), (16500, 3))),
    *(OTHERS[k] for k in (0, 6, 8)),
]
SMALL = Case((6, 50), (1,))


def numbers(case: Case, dtype: str) -> Any:
    """An array of a case, with numbers of another kind in each output unit."""
    rng = np.random.default_rng(sum(case.shape))
    whole = rng.normal(size=case.shape).astype(dtype_named(dtype))
    part = case.part(whole)
    for k, unit in enumerate(canonical_order.output_units(part.shape, case.axes)):
        part[unit] = KINDS[k % len(KINDS)](rng.normal(size=part[unit].shape), dtype)
    return whole


def canonical(grad: Any, case: Case, strength: float = 1.0) -> Any:
    """What is to come out, from a reference that knows no tiles."""
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
    """All of them at once, in the canonical order."""
    layouts = [
        "".join("i" if axis in case.axes else "o" for axis in range(grad.ndim))
        for grad, case in zip(grads, cases, strict=True)
    ]
    out = None if outs is None else list(outs)
    return gcx.centralize_many(
        list(grads), layouts=layouts, out=out, strength=strength, reproducible=True
    )


def dtype_named(name: str) -> Any:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def of_all_sizes(x: Any, dtype: str) -> Any:
    return x * np.exp(8 * np.sin(np.arange(x.size).reshape(x.shape)))


def subnormal(x: Any, dtype: str) -> Any:
    return x * float(ml_dtypes.finfo(dtype_named(dtype)).smallest_normal) / 8


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
