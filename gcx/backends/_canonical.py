"""The canonical order of summation, which gives the same bits in every library.

The sum over a fan-in, in the order of its axes, is that of a halving tree: padded with -0.0 (which
changes no sum, not even that of zeros) to a power of two, the second half is added to the first
until one element is left. A fan-in longer than `SEGMENT` is cut into segments of that length, the
last of which may be shorter; each is summed by such a tree, and the sums are added up from left to
right. float16 and bfloat16 are summed in float32, wider numbers in their own precision. The mean is
the sum divided by the number of elements, rounded as IEEE 754 says; then it is multiplied by the
strength, rounded again, and subtracted, and the difference is rounded to the dtype of the array.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import product
from math import prod
from operator import add
from typing import Any

DTYPES = ("float16", "bfloat16", "float32", "float64")

SEGMENT = 1 << 14

# Neighbours in memory that are better not torn apart: half a dozen pages of float32.
_RUN = 1 << 12


def check_dtype(name: str) -> None:
    """Raise a TypeError unless sums of this dtype have the same bits in every library."""
    if name not in DTYPES:
        msg = f"reproducible=True is for {', '.join(DTYPES)}, not {name}; cast the gradient first"
        raise TypeError(msg)


def fan_in_mean(x: Any, axes: Sequence[int], xp: Any, block: int = sys.maxsize) -> Any:
    """Mean over `axes`, which stay with size 1, of an array of float32 or float64.

    `xp` is the library of the array. About `block` elements are handled at a time, so that what
    lies between `x` and the sum stays in the cache.
    """
    kept = [a for a in range(x.ndim) if a not in axes]
    fan_in, units = (prod([x.shape[a] for a in group]) for group in (axes, kept))
    matrix = xp.reshape(xp.moveaxis(x, tuple(axes), tuple(range(len(axes)))), (fan_in, units))
    total = sum_along(matrix, 0, xp, block)
    # Not by a number of Python, for which libraries multiply by the reciprocal.
    mean = total / xp.full_like(total, fan_in)
    return xp.reshape(mean, [1 if a in axes else x.shape[a] for a in range(x.ndim)])


def sum_along(x: Any, axis: int, xp: Any, block: int = sys.maxsize) -> Any:
    """Sum along one axis, which goes; else as `fan_in_mean`."""
    return reduce(add, _segment_sums(x, axis, xp, block))


def blocks(
    shape: Sequence[int], steps: Sequence[int], axes: Sequence[int], size: int
) -> Iterator[tuple[slice, ...]]:
    """Cut an array into whole output units, about `size` elements together if they are no longer.

    `steps` are distances in memory, in elements; neighbours in memory stay together.
    """
    lengths = list(shape)
    kept = (a for a in range(len(shape)) if a not in axes)
    for a in sorted(kept, key=lambda a: abs(steps[a]), reverse=True):
        others = prod(lengths[:a] + lengths[a + 1 :])
        fitting = max(size // max(others, 1), _RUN // max(abs(steps[a]), 1), 1)
        lengths[a] = min(lengths[a], fitting)
    starts = (range(0, whole, max(part, 1)) for whole, part in zip(shape, lengths, strict=True))
    for corner in product(*starts):
        yield tuple(slice(k, k + part) for k, part in zip(corner, lengths, strict=True))


def _segment_sums(x: Any, axis: int, xp: Any, block: int) -> Iterator[Any]:
    """Sum segment by segment; several at once if they are small."""
    before, fan_in, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    whole = fan_in - fan_in % SEGMENT
    step = SEGMENT * max(1, block // (SEGMENT * max(prod((*before, *after)), 1)))
    for start in range(0, whole, step):
        several = _part(x, axis, start, min(start + step, whole))
        count = several.shape[axis] // SEGMENT
        segments = xp.reshape(several, (*before, count, SEGMENT, *after))
        sums = _tree(segments, axis + 1, xp, block)
        yield from (_element(sums, axis, k) for k in range(count))
    if whole < fan_in:
        yield _tree(_part(x, axis, whole, fan_in), axis, xp, block)


def _tree(x: Any, axis: int, xp: Any, block: int) -> Any:
    """Sum by a halving tree, in parts if there is more than a block.

    Every second element belongs to a subtree, and so does every fourth, every eighth ...
    """
    parts = 1
    while prod(x.shape) > parts * block and x.shape[axis] >= 4 * parts:
        parts *= 2
    if parts > 1:
        subtrees = (_part(x, axis, k, None, parts) for k in range(parts))
        x = xp.stack([_halved(subtree, axis) for subtree in subtrees], axis)
    return _halved(x, axis)


def _halved(x: Any, axis: int) -> Any:
    """Sum by a halving tree.

    The padding is never made: what has no partner is carried over, and makes up the tail.
    """
    size = x.shape[axis]
    if size == 1:
        return _element(x, axis, 0)
    half = 1 << (size - 1).bit_length() - 1
    head = _part(x, axis, 0, size - half) + _part(x, axis, half)
    tail = _part(x, axis, size - half, half)
    while tail.shape[axis]:
        paired, half = head.shape[axis], half // 2
        more, rest = paired - half, half - paired
        if more > 0:
            tail = _part(head, axis, more, half) + tail
            head = _part(head, axis, 0, more) + _part(head, axis, half)
        else:
            head = head + _part(tail, axis, rest, half)
            tail = _part(tail, axis, 0, rest) + _part(tail, axis, half)
    while half > 1:
        half //= 2
        head = _part(head, axis, 0, half) + _part(head, axis, half)
    return _element(head, axis, 0)


def _part(x: Any, axis: int, start: int, stop: int | None = None, step: int = 1) -> Any:
    return x[(*[slice(None)] * axis, slice(start, stop, step))]


def _element(x: Any, axis: int, k: int) -> Any:
    return x[(*[slice(None)] * axis, k)]
