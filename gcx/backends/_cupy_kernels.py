"""The CUDA kernel of `_cupy_kernels.cu`: what it can walk through, its tables, its launch."""

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

Axes = tuple[int, ...]
Walk = tuple[Matrix, ...]  # through an array

# What the kernel calls the dtypes that it knows.
ELEMENTS = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
}

# Arrays in one launch: two addresses of each are the most that all drivers take as parameters.
ARRAYS = 240

# Units and elements of a fan-in, which the kernel counts in 32 bits, with room for some tiles.
MOST = 1 << 29

THREADS = 256
PER_THREAD = 16
COLUMNS = 32  # of a tile
_TILE = THREADS * PER_THREAD
_PANEL_ROWS = _TILE // COLUMNS
_LANES = (4, 16, 64)  # threads that may share a row; else all do

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
    """Arrays of one dtype for one launch, as they lie in memory; with the tables for the kernel.

    Parameters
    ----------
    dtype : numpy.dtype
        One of `ELEMENTS`.
    walks : sequence of `Walk`
        For each array, at most `ARRAYS`, and the one where its result goes.
    """

    def __init__(self, dtype: Any, walks: Sequence[Walk]) -> None:
        entries = [_entry(k, matrix) for k, walk in enumerate(walks) for matrix in walk]
        # What takes long goes first, so that little is left to do at the end.
        entries.sort(key=lambda entry: entry.work, reverse=True)
        tiles = [entry.tiles for entry in entries]
        self.dtype = dtype.name
        self.wide = np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)
        self.matrix_of_tile = np.repeat(np.arange(len(tiles), dtype=np.int32), tiles)
        self.matrices = _table(entries, pack=16 // dtype.itemsize)
        self.counters = sum(entry.split_panels for entry in entries)
        self.partials = sum(entry.partials for entry in entries) * COLUMNS


def launch(batch: Batch, grads: Sequence[Any], outs: Sequence[Any], strength: float) -> None:
    """Centralize the arrays of a batch, on the current device and stream.

    Either an array is its own result, or they lie apart.
    """
    # Counters belong to a stream, and the per-thread default stream goes by one number for all.
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
    """Find what to multiply with, and how far to shift then, to divide a number below 2**30."""
    shift = 30 + (divisor - 1).bit_length()
    return _ceil(1 << shift, divisor), shift


def options(dtype: str) -> tuple[str, ...]:
    """Return what to compile it with."""
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
    """A matrix of an array, and how it is cut into tiles."""

    array: int
    matrix: Matrix
    lanes: int
    tiles: int
    splits: int = 1
    split_panels: int = 0

    @property
    def work(self) -> int:
        """Elements for which a tile may have to wait."""
        return self.matrix.fan_in * (COLUMNS if self.split_panels else 1)

    @property
    def partials(self) -> int:
        """Tiles that leave sums behind."""
        return self.tiles if self.split_panels else 0

    def is_packed(self, pack: int) -> bool:
        """Whether neighbours in memory can be moved `pack` at a time, if the first can."""
        _, _, unit_step, _, _, inner_step, outer_step = matrix = self.matrix
        steps = (unit_step,) if matrix.is_rows else (inner_step, outer_step)
        can_be = matrix.is_rows or self.lanes == 0
        return can_be and all(step % pack == 0 for step in (matrix.offset, *steps))


def _entry(array: int, matrix: Matrix) -> _Entry:
    units, fan_in = matrix.units, matrix.fan_in
    if matrix.is_rows or matrix.unit_step != 1:
        lanes = next((few for few in _LANES if fan_in <= few * PER_THREAD), THREADS)
        return _Entry(array, matrix, lanes, _ceil(units * lanes, THREADS))
    splits = _power_of_two(_ceil(min(fan_in, SEGMENT), _PANEL_ROWS))
    panels, tiles = _ceil(units, COLUMNS), splits * _ceil(fan_in, SEGMENT)
    return _Entry(array, matrix, 0, panels * tiles, splits, panels if tiles > 1 else 0)


def _table(entries: Sequence[_Entry], pack: int) -> Any:
    """Make the table of matrices; `pack` elements are 16 bytes."""
    table = np.zeros(len(entries), _MATRIX)
    for name in Matrix._fields:
        table[name] = [getattr(entry.matrix, name) for entry in entries]
    for name in ("array", "lanes", "splits"):
        table[name] = [getattr(entry, name) for entry in entries]
    counts = {"tile": "tiles", "partial": "partials", "counter": "split_panels"}
    for what, count in counts.items():
        table[f"first_{what}"] = _starts([getattr(entry, count) for entry in entries])
    table["packed"] = [entry.is_packed(pack) for entry in entries]
    reciprocals = [reciprocal(entry.matrix.inner) for entry in entries]
    table["reciprocal"], table["shift"] = zip(*reciprocals, strict=True)
    return table


def _starts(counts: Sequence[int]) -> list[int]:
    return [*accumulate(counts[:-1], initial=0)]


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
