"""NumPy: sums by BLAS and a subtraction, block by block, so that a block stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gcx._memory import Memory, repeats_itself
from gcx.backends import _canonical, one_by_one, refuse_dtype

NDArray = npt.NDArray[Any]
_DOUBLE = np.dtype(np.float64)

# Elements of a block: one MiB of float32. It stays in the second-level cache between the sum and
# the subtraction, so memory is read once.
_BLOCK = 1 << 18

# NumPy copies rows shorter than its buffer, to add many at once. If the rows are long, or in the
# cache already, this is slower than going row by row. At this length, it never copies.
_USUAL_BUFFER = 1 << 13
_LONG = 1 << 11  # fewest bytes of a long row
# Elements of a buffer, and of the smallest array worth the change: for long and for short rows.
_BUFFER, _LARGE = 1 << 8, 1 << 15
_SHORT_BUFFER, _HUGE = 1 << 11, 1 << 19

# Longest runs that BLAS sums in the array's dtype. Longer ones are cut, and the parts are added in
# float64. Measured error in float32, in ulp of the largest element: about 2 for units of mean 1e4
# and spread 1; at most 8 for equal numbers, since all roundings go in one direction.
_ROW_RUN = 1024
# Shorter for products of matrix and vector: BLAS adds with fewer lanes, down a column with one.
_SHORT_ROW, _COLUMN_RUN = 128, 32

# Most elements of a matrix whose columns are averaged faster in float64 than in runs.
_SMALL = 3 << 12


def check_dtype(grad: Any, /) -> None:
    if grad.dtype.kind not in "fc" and not _is_ml_dtype(grad.dtype):
        refuse_dtype(grad.dtype)
    if isinstance(grad, np.matrix):
        raise TypeError("np.matrix is not supported: it has no axes to keep; use np.asarray(grad)")


def is_writable(out: Any, _grad: Any, /) -> bool:
    is_apart = out.flags.c_contiguous or not repeats_itself(out.shape, out.strides, out.itemsize)
    return bool(out.flags.writeable and is_apart)


def find_memory(array: Any, /) -> Memory:
    return Memory(array.ctypes.data, array.shape, array.strides, array.itemsize)


def check_reproducible(grad: Any, _axes: Sequence[int], /) -> None:
    _canonical.check_dtype(grad.dtype.name)
    if type(grad) not in (np.ndarray, np.memmap):
        kind = type(grad).__name__
        raise TypeError(f"reproducible=True is for plain arrays, not {kind}; use np.asarray(grad)")


def fan_in_mean(x: Any, axes: tuple[int, ...], reproducible: bool, /) -> Any:
    if x.itemsize < 4:
        x = x.astype(np.float32)
    if not reproducible:
        return _average(x, axes).astype(x.dtype, copy=False)
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    mean = np.empty(shape, x.dtype.newbyteorder("="))
    for part, _, mean_of_part in _means_in_order(x, axes):
        mean[part] = mean_of_part
    return mean


def centralize(
    grad: Any, axes: tuple[int, ...], strength: float, out: Any | None, reproducible: bool, /
) -> Any:
    if out is not None and out is not grad and np.may_share_memory(out, grad):
        out[...] = centralize(grad, axes, strength, None, reproducible)
        return out
    result = np.empty_like(grad) if out is None else out
    if grad.itemsize < 4:
        wide = grad.astype(np.float32)
        result[...] = centralize(wide, axes, strength, wide, reproducible)
    elif reproducible:
        for part, block, mean in _means_in_order(grad, axes):
            np.subtract(block, _scale(mean, strength, block.dtype), out=result[part])
    elif (cut := _find_cut(grad, axes, result)) is not None:
        _centralize_matrix(grad, result, cut, axes[-1] == grad.ndim - 1, strength)
    else:  # the result of a subclass is its own choice
        result = np.subtract(grad, _scale(_average(grad, axes), strength, grad.dtype), out=out)
        return result.astype(grad.dtype, copy=False)  # NumPy returns native byte order
    return result


centralize_many = one_by_one(centralize)


def devices() -> list[str]:
    return ["cpu"]


def asarray(values: Any, dtype: str, _device: str, /) -> Any:
    return np.asarray(values).astype(_dtype(dtype))


def to_numpy(array: Any, /) -> Any:
    return array.astype(np.float32) if _is_ml_dtype(array.dtype) else array.copy()


def _dtype(name: str) -> Any:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


def _is_ml_dtype(dtype: np.dtype[Any]) -> bool:
    # float8_e8m0fnu is a scale, without sign and zero.
    is_float = dtype.name.startswith(("bfloat", "float")) and "e8m0" not in dtype.name
    return dtype.kind == "V" and is_float


def _means_in_order(
    x: NDArray, axes: tuple[int, ...]
) -> Iterator[tuple[tuple[slice, ...], NDArray, NDArray]]:
    """Yield each block of an array with its place and its means, in native byte order.

    The means are in the order of `_canonical`.
    """
    steps = [step // x.itemsize for step in x.strides]
    with np.errstate():  # restores the buffer size
        np.setbufsize(_BUFFER)
        for part in _canonical.blocks(x.shape, steps, axes, _BLOCK):
            block = x[part].astype(x.dtype.newbyteorder("="), copy=False)
            yield part, block, _canonical.fan_in_mean(block, axes, np, _BLOCK)


def _average(grad: NDArray, axes: tuple[int, ...]) -> NDArray:
    # In float64 at least, since NumPy adds one after the other along every axis but the last.
    accumulator = np.result_type(grad.dtype, np.float64)
    mean: NDArray = np.mean(grad, axis=axes, dtype=accumulator, keepdims=True)
    if accumulator.itemsize == grad.itemsize:  # the mean of the remainder corrects the rounding
        mean = mean + np.mean(grad - mean, axis=axes, keepdims=True)
    return mean


def _find_cut(grad: NDArray, axes: tuple[int, ...], out: NDArray) -> int | None:
    """Find where to cut the axes in two, so that BLAS can sum rows or columns; None if nowhere."""
    is_plain = type(grad) is np.ndarray and grad.dtype.char in "fd" and grad.flags.c_contiguous
    if not is_plain or not (out is grad or out.flags.c_contiguous):
        return None
    # The axes are in increasing order, so one end is enough.
    if axes[0] == grad.ndim - len(axes):
        return axes[0]
    return len(axes) if axes[-1] == len(axes) - 1 else None


def _centralize_matrix(x: NDArray, out: NDArray, cut: int, in_rows: bool, strength: float) -> None:
    """Centralize rows or columns, with a buffer that suits the length of a row."""
    if x.ndim != 2 or cut != 1:
        shape = prod(x.shape[:cut]), prod(x.shape[cut:])
        x, out = x.reshape(shape), out.reshape(shape)
    kernel = _centralize_rows if in_rows else _centralize_columns
    row = x.shape[1]
    buffer, fewest = (_BUFFER, _LARGE) if row * x.itemsize >= _LONG else (_SHORT_BUFFER, _HUGE)
    if row >= _USUAL_BUFFER or x.size < fewest:
        kernel(x, out, strength)
        return
    with np.errstate():  # restores the buffer size
        np.setbufsize(buffer)
        kernel(x, out, strength)


def _centralize_rows(grad: NDArray, out: NDArray, strength: float) -> None:
    units, fan_in = grad.shape
    step = max(1, _BLOCK // fan_in)
    for start in range(0, units, step):
        block = grad[start : start + step]
        mean = _scale(_sum_rows(block) / fan_in, strength, grad.dtype)
        np.subtract(block, mean[:, None], out=out[start : start + step])


def _centralize_columns(grad: NDArray, out: NDArray, strength: float) -> None:
    if grad.size:
        np.subtract(grad, _scale(_average_columns(grad), strength, grad.dtype), out=out)


def _scale(mean: NDArray, strength: float, dtype: np.dtype[Any]) -> NDArray:
    return (mean if strength == 1.0 else mean * strength).astype(dtype, copy=False)


def _sum_rows(block: NDArray) -> Any:
    units, fan_in = block.shape
    ones = _ones(block.dtype)
    if fan_in <= _ROW_RUN:
        return (np.matmul if fan_in <= _SHORT_ROW else np.vecdot)(block, ones[:fan_in])
    run = _find_run(fan_in, _ROW_RUN)
    rest = fan_in % run
    sums = np.vecdot(block[:, : fan_in - rest].reshape(units, -1, run), ones[:run])
    # np.dot adds float32 in float64, as the ones are; float64 is better off added in pairs.
    sums = sums.sum(axis=1) if sums.dtype == _DOUBLE else np.dot(sums, np.ones(sums.shape[1]))
    if rest:
        sums += np.vecdot(block[:, -rest:], ones[:rest])
    return sums


def _average_columns(matrix: NDArray) -> Any:
    fan_in, units = matrix.shape
    if fan_in <= _COLUMN_RUN or matrix.itemsize == 8:
        return _sum_columns(matrix) / fan_in
    if matrix.size <= _SMALL:
        return np.dot(_shares(fan_in, fan_in), matrix)
    run = _find_run(fan_in, _COLUMN_RUN)
    rest = fan_in % run
    sums = _ones(matrix.dtype)[:run] @ matrix[: fan_in - rest].reshape(-1, run, units)
    mean = np.dot(_shares(len(sums), fan_in), sums)
    if rest:
        mean += np.dot(_shares(rest, fan_in), matrix[-rest:])
    return mean


def _sum_columns(matrix: NDArray) -> Any:
    """Sum in runs, and their sums in runs again: nothing is wider than float64."""
    fan_in, units = matrix.shape
    rest = (fan_in - 1) % _COLUMN_RUN + 1
    ones, split = _ones(matrix.dtype), fan_in - rest
    total = ones[:rest] @ matrix[split:]
    if split:
        total += _sum_columns(ones[:_COLUMN_RUN] @ matrix[:split].reshape(-1, _COLUMN_RUN, units))
    return total


@cache
def _find_run(fan_in: int, longest: int) -> int:
    """Find a length of runs that leaves no rest, if there is one near the longest."""
    fewest = -(-fan_in // longest)
    tried = range(fewest, 2 * fewest + 7)
    return next((fan_in // count for count in tried if fan_in % count == 0), longest)


@lru_cache
def _shares(count: int, fan_in: int) -> NDArray:
    """Make weights in float64, for a part of an average."""
    return np.full(count, 1 / fan_in)


@cache
def _ones(dtype: np.dtype[Any]) -> NDArray:
    """Make as many ones as the longest sum has, once for a dtype."""
    return np.ones(_ROW_RUN, dtype)
