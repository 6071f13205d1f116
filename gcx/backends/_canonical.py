"""The canonical order of summation: it gives the same bits in every library.

A halving tree sums the fan-in, in the order of its axes. The fan-in is padded to a power of two
with -0.0, which changes no sum, not even a sum of zeros. Then the second half is added to the first
until one element is left. A fan-in longer than `SEGMENT` is cut into segments; the sums of their
trees are added from left to right. docs/reproducible.md defines the roundings.
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
_RUN = 1 << 12  # neighbours in memory to keep in one block, for speed: four pages of float32


def check_dtype(name: str) -> None:
    if name not in DTYPES:
        raise TypeError(f"reproducible=True is for {', '.join(DTYPES)}, not {name}; cast it first")


def fan_in_mean(x: Any, axes: Sequence[int], xp: Any, block: int = sys.maxsize) -> Any:
    """Average in float32 or float64; `block` elements at a time stay in the cache."""
    fan_in = prod([x.shape[a] for a in axes])
    units = prod([x.shape[a] for a in range(x.ndim) if a not in axes])
    # A matrix (fan-in, units): a view if the strides allow, else a copy.
    if axes[0] == x.ndim - len(axes):  # a faster way to the same view
        matrix = x.reshape((units, fan_in)).T
    else:
        matrix = xp.moveaxis(x, axes, tuple(range(len(axes)))).reshape((fan_in, units))
    total = reduce(add, _sum_segments(matrix, xp, block))
    # Given a Python number, libraries would multiply by its reciprocal.
    mean = total / xp.full_like(total, len(matrix))
    return mean.reshape([1 if a in axes else x.shape[a] for a in range(x.ndim)])


def blocks(
    shape: Sequence[int], steps: Sequence[int], axes: Sequence[int], size: int
) -> Iterator[tuple[slice, ...]]:
    """Cut an array into blocks of about `size` elements, each of whole output units.

    Units that are neighbours in memory stay together. `steps` are the strides, in elements.
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


def _sum_segments(matrix: Any, xp: Any, block: int) -> Iterator[Any]:
    """Sum over the first axis segment by segment; small segments several at once."""
    fan_in, units = matrix.shape
    whole = fan_in - fan_in % SEGMENT
    step = SEGMENT * max(1, block // (SEGMENT * max(units, 1)))
    for start in range(0, whole, step):
        several = matrix[start : min(start + step, whole)]
        count = len(several) // SEGMENT
        yield from _sum_tree(xp.moveaxis(several.reshape((count, SEGMENT, units)), 1, 0), xp, block)
    if whole < fan_in:
        yield _sum_tree(matrix[whole:], xp, block)


def _sum_tree(x: Any, xp: Any, block: int) -> Any:
    """Sum a segment; if it exceeds a block, by subtrees of elements that are 2, 4, 8 ... apart."""
    parts = 1
    while prod(x.shape) > parts * block and len(x) >= 4 * parts:
        parts *= 2
    return halve(x if parts == 1 else xp.stack([halve(x[k::parts]) for k in range(parts)]))


def halve(x: Any) -> Any:
    """Sum a segment, the first axis; `tail` carries elements over that have no partner."""
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
