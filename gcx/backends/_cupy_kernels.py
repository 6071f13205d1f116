"""The CUDA kernel of `_cupy_kernels.cu`: its limits, its tables and its launch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.resources import files
from itertools import accumulate
from threading import get_ident
from typing import Any, NamedTuple

import cupy as cp
import numpy as np

from gcx.backends._canonical import SEGMENT
from gcx.backends._matrices import Matrix
from gcx.backends._memory import divide_up, power_of_two

Axes = tuple[int, ...]
Walk = tuple[Matrix, ...]  # the matrices of an array

# Names of the supported dtypes in CUDA.
ELEMENTS = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
}

# Arrays in one launch: their addresses, two each, fit into the parameters on every driver.
ARRAYS = 240

# Most units, and most elements of a fan-in: the kernel counts them in 32 bits, in whole tiles.
MOST = 1 << 29

THREADS = 256
PER_THREAD = 16
COLUMNS = 32  # in a tile
_TILE = THREADS * PER_THREAD
_PANEL_ROWS = _TILE // COLUMNS
_LANES = (4, 16, 64)  # threads that share a short row; all share a long one

_ARRAYS = np.dtype([("grads", "u8", ARRAYS), ("outs", "u8", ARRAYS)])
_WIDE_FIELDS = ("offset", "unit_step", "inner_step", "outer_step", "first_partial")
_FIELDS = ("first_counter", "array", "first_tile", "units", "fan_in", "inner")
_MATRIX = np.dtype(
    [
        *((name, "i8") for name in _WIDE_FIELDS),
        *((name, "i4") for name in _FIELDS),
        ("reciprocal", "u4"),
        *((name, "i4") for name in ("shift", "lanes", "splits", "packed")),
    ],
    align=True,
)


class Batch:
    """At most `ARRAYS` arrays of one dtype for one launch, and their tables for the kernel."""

    def __init__(self, dtype: Any, walks: Sequence[Walk]) -> None:
        entries = [_make_entry(k, matrix) for k, walk in enumerate(walks) for matrix in walk]
        # Long tiles go first, so that the device is busy to the end.
        entries.sort(key=lambda entry: entry.work, reverse=True)
        tiles = [entry.tiles for entry in entries]
        self.dtype = dtype.name
        self.wide = np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)
        self.matrix_of_tile = np.repeat(np.arange(len(tiles), dtype=np.int32), tiles)
        self.matrices = _make_table(entries, pack=16 // dtype.itemsize)
        self.counters = sum(entry.split_panels for entry in entries)
        self.partials = sum(entry.partials for entry in entries) * COLUMNS


def launch(batch: Batch, grads: Sequence[Any], outs: Sequence[Any], strength: float) -> None:
    """Centralize the arrays of a batch, on the current device and stream.

    A result is the array itself, or shares no memory with it.
    """
    # Counters belong to a stream. The per-thread default streams all have one number.
    owner = (cp.cuda.runtime.getDevice(), cp.cuda.get_current_stream().ptr, get_ident())
    matrix_of_tile, matrices, counters = _tables(batch, owner)
    arrays = np.zeros(1, _ARRAYS)
    arrays["grads"][0, : len(grads)] = [grad.data.ptr for grad in grads]
    arrays["outs"][0, : len(outs)] = [out.data.ptr for out in outs]
    partials = cp.empty(batch.partials, batch.wide)
    tables = (matrix_of_tile, matrices, partials, counters)
    _kernel(batch.dtype)(
        (len(matrix_of_tile),), (THREADS,), (arrays, *tables, batch.wide.type(strength))
    )


def source() -> str:
    """Return the source of the kernel."""
    return files("gcx.backends").joinpath("_cupy_kernels.cu").read_text(encoding="utf-8")


def reciprocal(divisor: int) -> tuple[int, int]:
    """Find the factor and the shift that divide a number below 2**30 by `divisor`."""
    shift = 30 + (divisor - 1).bit_length()
    return divide_up(1 << shift, divisor), shift


def options(dtype: str) -> tuple[str, ...]:
    """Return the compiler options for a dtype."""
    constants = {
        "ELEMENT": ELEMENTS[dtype],
        "ARRAYS": ARRAYS,
        "THREADS": THREADS,
        "PER_THREAD": PER_THREAD,
        "COLUMNS": COLUMNS,
        "SEGMENT": SEGMENT,
    }
    definitions = (f"-D{name}={value}" for name, value in constants.items())
    return ("-std=c++17", "--fmad=false", *definitions)


@cache
def _kernel(dtype: str) -> Any:
    return cp.RawModule(code=source(), options=options(dtype)).get_function("gcx_centralize")


@lru_cache(maxsize=1 << 10)
def _tables(batch: Batch, owner: object) -> tuple[Any, Any, Any]:
    """Copy the tables to the device, with counters, for one stream."""
    del owner
    matrices = cp.asarray(batch.matrices.view(np.uint8))
    return cp.asarray(batch.matrix_of_tile), matrices, cp.zeros(batch.counters, np.uint32)


class _Entry(NamedTuple):
    """A matrix of an array, cut into tiles."""

    array: int
    matrix: Matrix
    lanes: int
    tiles: int
    splits: int = 1
    split_panels: int = 0

    @property
    def work(self) -> int:
        """Elements that the slowest tile reads."""
        return self.matrix.fan_in * (COLUMNS if self.split_panels else 1)

    @property
    def partials(self) -> int:
        """Tiles that store partial sums."""
        return self.tiles if self.split_panels else 0

    def is_packed(self, pack: int) -> bool:
        """Return True if elements can be moved `pack` at a time, given an aligned array."""
        _, _, unit_step, _, _, inner_step, outer_step = matrix = self.matrix
        steps = (unit_step,) if matrix.is_rows else (inner_step, outer_step)
        can_be = matrix.is_rows or self.lanes == 0
        return can_be and all(step % pack == 0 for step in (matrix.offset, *steps))


def _make_entry(array: int, matrix: Matrix) -> _Entry:
    units, fan_in = matrix.units, matrix.fan_in
    if matrix.is_rows or matrix.unit_step != 1:
        lanes = next((few for few in _LANES if fan_in <= few * PER_THREAD), THREADS)
        return _Entry(array, matrix, lanes, divide_up(units * lanes, THREADS))
    splits = power_of_two(divide_up(min(fan_in, SEGMENT), _PANEL_ROWS))
    panels, tiles = divide_up(units, COLUMNS), splits * divide_up(fan_in, SEGMENT)
    return _Entry(array, matrix, 0, panels * tiles, splits, panels if tiles > 1 else 0)


def _make_table(entries: Sequence[_Entry], pack: int) -> Any:
    """Make the table of matrices; `pack` elements are 16 bytes."""
    table = np.zeros(len(entries), _MATRIX)
    for name in Matrix._fields:
        table[name] = [getattr(entry.matrix, name) for entry in entries]
    for name in ("array", "lanes", "splits"):
        table[name] = [getattr(entry, name) for entry in entries]
    counts = {"tile": "tiles", "partial": "partials", "counter": "split_panels"}
    for what, count in counts.items():
        table[f"first_{what}"] = _sum_before([getattr(entry, count) for entry in entries])
    table["packed"] = [entry.is_packed(pack) for entry in entries]
    reciprocals = [reciprocal(entry.matrix.inner) for entry in entries]
    table["reciprocal"], table["shift"] = zip(*reciprocals, strict=True)
    return table


def _sum_before(counts: Sequence[int]) -> list[int]:
    return [*accumulate(counts[:-1], initial=0)]
