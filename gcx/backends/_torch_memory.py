"""The memory of tensors: where it is, and pieces of it that stay in a CPU's cache.

Large narrow tensors are cut into blocks, small ones go together in batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from operator import attrgetter
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

_find_base: Callable[[Tensor], Tensor | None] = attrgetter("_base")  # of a view

# Elements of a block, half a MiB of float32, and most elements that are not worth cutting.
_BLOCK, SMALL = 1 << 17, 1 << 18

# Bytes of a batch, and most lists of fan-ins that are remembered.
_BATCH, _KEPT = 1 << 19, 1 << 6

# Fewest neighbours in memory that are worth summing first.
_VECTORS = 1 << 5


def is_writable(out: Tensor, grad: Tensor, /) -> bool:
    if (out.requires_grad or grad.requires_grad) and torch.is_grad_enabled():
        viewed = _find_base(out)
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


def widen(x: Tensor, size: int, cut: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield a copy of each block, all in one memory: it is in the cache, and new memory is not."""
    wide = x.new_empty(0)
    for part in torch.split(x, size, cut):
        wide = wide.copy_(part) if wide.shape == part.shape else part.to(dtype, copy=True)
        yield wide


class Totals(NamedTuple):
    """Memory for the sums of a batch, which lie side by side in one tensor."""

    part: slice  # of the list of gradients
    shapes: Sequence[tuple[int, ...]]
    axes: Sequence[Any]  # a list if they are no neighbours; one as a number, which is faster
    counts: Tensor  # of the numbers in each sum
    whole: Tensor
    each: list[Tensor]
    of_weights: Tensor
    of_each_weight: list[Tensor]


class Workspace(dict[Any, Sequence[Totals]]):
    """The memory for sums that an optimizer needs in each step; a copy begins anew."""

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return type(self), ()

    def subtract_means(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor],
        fan_ins: tuple[FanIn, ...],
        rate: float | Tensor | None,
        strength: float,
    ) -> bool:
        """Subtract means as `_torch.subtract_means_` does, in few calls, from alike tensors.

        Return False, and do nothing, the first time that these fan-ins come: it may be the last.
        """
        key = fan_ins, grads[0].dtype
        if key not in self:
            if len(self) >= _KEPT:
                self.clear()
            self[key] = ()
            return False
        self[key] = batches = self[key] or [*_make_totals(*key)]
        for totals in batches:
            seen = _sum_each(grads, totals, totals.each)
            if rate is not None:
                _sum_each(weights, totals, totals.of_each_weight)
                totals.whole.add_(totals.of_weights.mul_(rate))
            totals.whole.div_(totals.counts)
            if strength != 1.0:
                totals.whole.mul_(strength)
            torch._foreach_sub_(seen, totals.each)
        return True


def _make_totals(fan_ins: Sequence[FanIn], dtype: torch.dtype) -> Iterator[Totals]:
    start = size = 0
    for end, (shape, _) in enumerate(fan_ins, 1):
        size += prod(shape) * dtype.itemsize
        if size < _BATCH and end < len(fan_ins):
            continue
        batch = fan_ins[start:end]
        kept = [[1 if a in axes else n for a, n in enumerate(shape)] for shape, axes in batch]
        units = [*map(prod, kept)]
        counts = [prod([shape[a] for a in axes]) for shape, axes in batch]
        with _real_tensors():
            of_each = torch.tensor(counts, dtype=dtype).repeat_interleave(torch.tensor(units))
            sums = torch.zeros(2, sum(units), dtype=dtype)
        each = [
            [total.view(shape) for total, shape in zip(torch.split(x, units), kept, strict=True)]
            for x in sums
        ]
        axes = [(a if a[1:] else a[0]) if a[-1] - a[0] < len(a) else [*a] for _, a in batch]
        shapes = [shape for shape, _ in batch]
        yield Totals(slice(start, end), shapes, axes, of_each, sums[0], each[0], sums[1], each[1])
        start, size = end, 0


def _sum_each(tensors: Sequence[Tensor], totals: Totals, outs: Sequence[Tensor]) -> list[Tensor]:
    """Sum the tensors of a batch; return them in the shapes of their fan-ins."""
    pairs = zip(tensors[totals.part], totals.shapes, strict=True)
    seen = [x if len(shape) == x.ndim else x.view(shape) for x, shape in pairs]
    for x, axes, out in zip(seen, totals.axes, outs, strict=True):
        if type(axes) is list:
            out.copy_(sum_over(x, (*axes,)))
        else:
            torch.sum(x, axes, True, out=out)
    return seen


def is_simple(x: Tensor) -> bool:
    """Return True for a tensor on a CPU that nothing but autograd watches."""
    is_traced = peek_interpreter_stack() is not None or _is_tracing()
    return x.is_cpu and type(x) in PLAIN and not is_traced


def average(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Average a simple tensor over `axes`, which stay with size 1."""
    total = x.sum(axes[0], True) if len(axes) < 2 else sum_over(x, axes)
    # Division by a tensor takes half as long as by a number, which `Tensor.mean` does.
    return total.div_(_count(x.shape, axes, x.dtype))


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
def _count(shape: tuple[int, ...], axes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Make a tensor of the number of elements in a fan-in."""
    with _real_tensors():
        return torch.tensor(prod([shape[a] for a in axes]), dtype=dtype)


@contextmanager
def _real_tensors() -> Iterator[None]:
    """Make tensors on a CPU that are right at any time, in whichever mode torch is now."""
    with torch.inference_mode(False), torch.device("cpu"), _disable_current_modes():
        yield
