"""The memory of tensors: where it is, and pieces of it that stay in a CPU's cache.

Large narrow tensors are cut into blocks, small ones go together in batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import prod
from operator import attrgetter

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.forward_ad import unpack_dual
from torch.nn import Parameter

from gcx._memory import Memory, find_span, repeats_itself

PLAIN = (Tensor, Parameter)  # types whose tensors are always on one process

_find_base: Callable[[Tensor], Tensor | None] = attrgetter("_base")  # of a view

# Elements of a block: half a MiB of float32.
_BLOCK = 1 << 17

# Bytes of a batch.
BATCH = 1 << 19

# Fewest neighbours in memory that are worth summing first.
_VECTORS = 1 << 5


def is_writable(out: Tensor, grad: Tensor, /) -> bool:
    if torch.is_grad_enabled() and (out.requires_grad or grad.requires_grad):
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


def is_large(x: Tensor) -> bool:
    """Return True for a tensor on a CPU that is worth cutting."""
    return x.numel() > 2 * _BLOCK and x.device.type == "cpu"


def find_block(x: Tensor) -> tuple[int, int]:
    """Find the outermost axis in memory, and the size of a block along it."""
    shape, steps = x.shape, x.stride()
    cut = max(range(x.ndim), key=lambda axis: steps[axis] if shape[axis] > 1 else 0)
    return cut, max(1, _BLOCK * shape[cut] // x.numel())


def widen(x: Tensor, size: int, cut: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield a copy of each block, all in one memory: it is in the cache, and new memory is not."""
    wide = x.new_empty(0)
    for part in torch.split(x, size, cut):
        is_new = wide.shape != part.shape
        wide = part.to(dtype, copy=True) if is_new else wide.copy_(part)
        yield wide


def subtract_means(
    batch: Sequence[tuple[Tensor, Tensor, tuple[int, ...]]],
    rate: float | Tensor | None,
    strength: float,
) -> None:
    """Subtract means as `_torch.subtract_means_` does, in few calls, which small tensors need.

    All gradients are contiguous, or there is one.
    """
    grads = [grad for grad, _, _ in batch]
    # Division by a tensor takes half as long as by a number, which `Tensor.mean` does.
    counts = [_count(grad.shape, axes, grad.dtype) for grad, _, axes in batch]
    totals = [
        # All axes are neighbours in memory: the most frequent case.
        grad.sum(axes, True)
        if axes[-1] - axes[0] < len(axes) and grad.is_contiguous()
        else sum_over(grad, axes)
        for grad, _, axes in batch
    ]
    if rate is not None:
        of_weights = [
            x.sum(axes, True, dtype=grad.dtype)
            if axes[-1] - axes[0] < len(axes) and x.is_contiguous()
            else sum_over(x.to(grad.dtype), axes)
            for grad, x, axes in batch
        ]
        if isinstance(rate, Tensor):
            of_weights = [rate * total for total in of_weights]
        torch._foreach_add_(totals, of_weights, alpha=1.0 if isinstance(rate, Tensor) else rate)
    torch._foreach_div_(totals, counts)
    if strength != 1.0:
        torch._foreach_mul_(totals, strength)
    torch._foreach_sub_(grads, totals)


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
    return sorted(runs, key=rank)


@lru_cache(maxsize=1 << 12)
def _count(shape: tuple[int, ...], axes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Make a tensor of the number of elements in a fan-in."""
    with torch.inference_mode(False):
        return torch.tensor(prod([shape[a] for a in axes]), dtype=dtype, device="cpu")
