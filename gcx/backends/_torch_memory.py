"""The memory of tensors: where it is, and pieces of it that stay in a CPU's cache.

Large narrow tensors are cut into blocks, small ones go together in batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _is_tracing
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.forward_ad import unpack_dual
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes

from gcx._memory import Memory, find_span, repeats_itself

# A shape with one axis for each letter of a layout, and its fan-in axes: see `gcx.Layout.split`.
FanIn = tuple[tuple[int, ...], tuple[int, ...]]

PLAIN = (Tensor, Parameter)  # types whose tensors are always on one process

# Elements of a block, 3/4 MiB of float32, and most elements that are not worth cutting.
_BLOCK, SMALL = 3 << 16, 1 << 18
_BATCH = 1 << 19  # bytes, at which a batch is full

# Fewest neighbours in memory that are worth summing first.
_VECTORS = 1 << 5


def is_writable(out: Tensor, grad: Tensor, /) -> bool:
    if (out.requires_grad or grad.requires_grad) and torch.is_grad_enabled():
        viewed = getattr(out, "_base", None)
        base = out if viewed is None else viewed
        if out is not grad or (base.is_leaf and base.requires_grad):
            return False
    if not torch.compiler.is_compiling():
        if out.is_inference() and not torch.is_inference_mode_enabled():
            return False
        if out is not grad and (
            _is_dual(out) or _is_dual(grad) or peek_interpreter_stack() is not None
        ):
            return False  # there are no rules for out=
    return out.is_contiguous() or not repeats_itself(out.shape, out.stride())


def _is_dual(x: Tensor) -> bool:
    return unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def find_memory(x: Tensor) -> Memory:
    is_traced = torch.compiler.is_compiling() or peek_interpreter_stack() is not None
    if is_traced or type(x) not in PLAIN or not (start := x.data_ptr()):
        return Memory(id(x))
    return Memory(start, x.shape, [step * x.itemsize for step in x.stride()], x.itemsize)


def count_bytes(x: Tensor) -> int:
    """Count the bytes from the first element of a tensor to the end of its last."""
    return find_span(Memory(0, x.shape, x.stride()))[1] * x.itemsize


def find_block(x: Tensor) -> tuple[int, int]:
    """Find the outermost axis in memory, and the size of a block along it."""
    shape, steps = x.shape, x.stride()
    cut = max(range(x.ndim), key=lambda axis: steps[axis] if shape[axis] > 1 else 0)
    return cut, max(1, _BLOCK * shape[cut] // x.numel())


def widen(parts: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield a copy of each block, all in one memory: it is in the cache, and new memory is not."""
    wide = parts[0].new_empty(0)
    for part in parts:
        wide = wide.copy_(part) if wide.shape == part.shape else part.to(dtype, copy=True)
        yield wide


def is_simple(x: Tensor) -> bool:
    """Return True for a tensor on a CPU that nothing but autograd watches."""
    if not x.is_cpu or type(x) not in PLAIN:
        return False
    return peek_interpreter_stack() is None and not _is_tracing()


def average(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Average a simple tensor over `axes`, which stay with size 1."""
    total, count = _add_up(x, axes)
    return total.div_(_make_divisor(count, x.dtype))


def subtract_average(
    x: Tensor, axes: tuple[int, ...], strength: float, out: Tensor | None
) -> Tensor:
    """Centralize a simple tensor in few calls; `out` is the tensor itself, or None."""
    total, count = _add_up(x, axes)
    if strength != 1.0:
        total *= strength
    if inverse := _invert(count):
        return torch.sub(x, total, alpha=inverse) if out is None else x.sub_(total, alpha=inverse)
    mean = total.div_(_make_divisor(count, x.dtype))
    return x - mean if out is None else x.sub_(mean)


class _Batch(NamedTuple):
    """Neighbours in a list of gradients that fit into the cache, and how to average them."""

    part: slice  # of the list
    shapes: Sequence[tuple[int, ...]]
    axes: Sequence[Any]  # a number or a list for `torch.sum`; a tuple for `sum_over`
    divisors: list[Tensor]  # none if the fan-ins are all of one size, a power of two
    inverse: float  # of that power of two; otherwise 1


def subtract_averages(
    tensors: Sequence[Tensor],
    fan_ins: tuple[FanIn, ...],
    strength: float,
    weights: Sequence[Tensor],
    rate: float | None,
) -> None:
    """Centralize simple, contiguous tensors in place; see `_torch.subtract_means_`."""
    for batch in _cut_batches(fan_ins, tensors[0].dtype):
        seen, totals = _sum_each(tensors, batch)
        if rate is not None:
            torch._foreach_add_(totals, _sum_each(weights, batch)[1], alpha=rate)
        if strength != 1.0:
            torch._foreach_mul_(totals, strength)
        if batch.divisors:
            torch._foreach_div_(totals, batch.divisors)
        torch._foreach_sub_(seen, totals, alpha=batch.inverse)


def _sum_each(tensors: Sequence[Tensor], batch: _Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors of a batch in the shapes of their fan-ins, and their sums."""
    pairs = zip(tensors[batch.part], batch.shapes, strict=True)
    seen = [x if x.ndim == len(shape) else x.view(shape) for x, shape in pairs]
    return seen, [
        sum_over(x, axes) if type(axes) is tuple else torch.sum(x, axes, True)
        for x, axes in zip(seen, batch.axes, strict=True)
    ]


@lru_cache(maxsize=1 << 6)
def _cut_batches(fan_ins: tuple[FanIn, ...], dtype: torch.dtype) -> list[_Batch]:
    batches = []
    start = size = 0
    for end, (shape, _) in enumerate(fan_ins, 1):
        size += prod(shape) * dtype.itemsize
        if size < _BATCH and end < len(fan_ins):
            continue
        part = fan_ins[start:end]
        counts = [prod([shape[a] for a in axes]) for shape, axes in part]
        inverse = _invert(counts[0]) if len({*counts}) == 1 else 0.0
        divisors = [] if inverse else [_make_divisor(count, dtype) for count in counts]
        shapes, axes = [shape for shape, _ in part], [_join(axes) for _, axes in part]
        batches.append(_Batch(slice(start, end), shapes, axes, divisors, inverse or 1.0))
        start, size = end, 0
    return batches


def _join(axes: tuple[int, ...]) -> Any:
    """Return neighbours as a list, or one axis as a number, for `torch.sum`; others as they are."""
    if axes[-1] - axes[0] >= len(axes):
        return axes
    return [*axes] if axes[1:] else axes[0]  # a number is quicker


def _invert(count: int) -> float:
    """Return the inverse of a power of two, which is exact; 0 for other numbers."""
    return 1 / count if count.bit_count() == 1 else 0.0


def _add_up(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, int]:
    """Sum over a fan-in, and count its elements."""
    if len(axes) < 2:  # the usual case, and quick
        return torch.sum(x, axes[0], True), x.shape[axes[0]]
    return sum_over(x, axes), prod([x.shape[axis] for axis in axes])


def sum_over(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Sum over `axes`, which stay with size 1."""
    for run in find_runs(x, axes):
        x = x.sum(run, True)
    return x


def find_runs(x: Tensor, axes: tuple[int, ...]) -> Sequence[tuple[int, ...]]:
    """Part the axes of a sum where other axes lie between them in the memory of a CPU.

    Over all of them at once, torch would add many numbers one after the other, and round each time.
    """
    if len(axes) < 2 or not x.is_cpu or (axes[-1] - axes[0] == len(axes) - 1 and x.is_contiguous()):
        return (axes,)
    shape, steps = x.shape, x.stride()
    runs: list[tuple[int, ...]] = []
    for axis in sorted(axes, key=lambda axis: -steps[axis]):
        if runs and steps[runs[-1][-1]] == shape[axis] * steps[axis]:
            runs[-1] += (axis,)
        elif shape[axis] > 1:
            runs.append((axis,))

    def rank(run: tuple[int, ...]) -> tuple[bool, int, int]:
        size, step = prod([shape[axis] for axis in run]), steps[run[-1]]
        return step > 1 or size < _VECTORS, -size, step

    # The run that leaves the least to do comes first, or one that is summed in vectors.
    return sorted(runs, key=rank) or (axes,)


@lru_cache(maxsize=1 << 12)
def _make_divisor(count: int, dtype: torch.dtype) -> Tensor:
    # Division by a tensor takes half as long as by a number.
    with _real_tensors():
        return torch.tensor(count, dtype=dtype)


@contextmanager
def _real_tensors() -> Iterator[None]:
    """Make tensors on a CPU that are right at any time, in whichever mode torch is now."""
    with torch.inference_mode(False), torch.device("cpu"), _disable_current_modes():
        yield
