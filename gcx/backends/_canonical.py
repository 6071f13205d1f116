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

# Neighbours in memory that are better not torn apart: four pages of float32.
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
    matrix = _matrix(x, axes, xp)
    total = reduce(add, _segment_sums(matrix, xp, block))
    # Not by a number of Python, for which libraries multiply by the reciprocal.
    mean = total / xp.full_like(total, len(matrix))
    return mean.reshape([1 if a in axes else x.shape[a] for a in range(x.ndim)])


def blocks(
    shape: Sequence[int], steps: Sequence[int], axes: Sequence[int], size: int
) -> Iterator[tuple[slice, ...]]:
    """Cut an array between its output units, into parts of `size` elements if that can be.

    Parts are larger where a unit is, or where units lie beside each other in memory: these stay
    together. `steps` are the distances in memory along the axes, in elements.
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


def _matrix(x: Any, axes: Sequence[int], xp: Any) -> Any:
    """See an array as one of (fan-in, units), if its strides allow; else copy it."""
    fan_in = prod([x.shape[a] for a in axes])
    units = prod([x.shape[a] for a in range(x.ndim) if a not in axes])
    if axes[0] == x.ndim - len(axes):  # this view is made sooner
        return x.reshape((units, fan_in)).T
    return xp.moveaxis(x, axes, tuple(range(len(axes)))).reshape((fan_in, units))


def _segment_sums(matrix: Any, xp: Any, block: int) -> Iterator[Any]:
    """Sum over the first axis segment by segment; several at once if they are small."""
    fan_in, units = matrix.shape
    whole = fan_in - fan_in % SEGMENT
    step = SEGMENT * max(1, block // (SEGMENT * max(units, 1)))
    for start in range(0, whole, step):
        several = matrix[start : min(start + step, whole)]
        count = len(several) // SEGMENT
        yield from _tree(xp.moveaxis(several.reshape((count, SEGMENT, units)), 1, 0), xp, block)
    if whole < fan_in:
        yield _tree(matrix[whole:], xp, block)


def _tree(x: Any, xp: Any, block: int) -> Any:
    """Sum over the first axis by a halving tree, in parts if there is more than a block.

    Every second element belongs to a subtree, and so does every fourth, every eighth ...
    """
    parts = 1
    while prod(x.shape) > parts * block and len(x) >= 4 * parts:
        parts *= 2
    return halved(x if parts == 1 else xp.stack([halved(x[k::parts]) for k in range(parts)]))


def halved(x: Any) -> Any:
    """Sum over the first axis, of a segment at most, by a halving tree.

    The padding is never made: what has no partner is carried over, and makes up the tail.
    """
    if len(x) == 1:
        return x[0]
    half = 1 << (len(x) - 1).bit_length() - 1
    head, tail = x[: len(x) - half] + x[half:], x[len(x) - half : half]
    while len(tail):
        half //= 2
        if len(head) > half:
            more = len(head) - half
            head, tail = head[:more] + head[half:], head[more:half] + tail
        else:
            rest = half - len(head)
            head, tail = head + tail[rest:half], tail[:rest] + tail[half:]
    while half > 1:
        half //= 2
        head = head[:half] + head[half:]
    return head[0]
