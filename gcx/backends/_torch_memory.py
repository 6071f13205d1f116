"""PyTorch: the memory of tensors, and whether it can be written to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import attrgetter

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.nn import Parameter

from gcx._memory import repeats_itself, span

_find_base: Callable[[Tensor], Tensor | None] = attrgetter("_base")  # of a view


def is_writable(out: Tensor, grad: Tensor, /) -> bool:
    """See `gcx.backends.Backend`."""
    if torch.is_grad_enabled() and (out.requires_grad or grad.requires_grad):
        viewed = _find_base(out)
        base = out if viewed is None else viewed
        if out is not grad or (base.is_leaf and base.requires_grad):
            return False
    if not torch.compiler.is_compiling():
        if out.is_inference() and not torch.is_inference_mode_enabled():
            return False
        if out is not grad and peek_interpreter_stack() is not None:  # no rules for out=
            return False
    return out.is_contiguous() or not repeats_itself(out.shape, out.stride())


def find_span(x: Tensor) -> tuple[int, int] | None:
    """See `gcx.backends.Backend`."""
    is_traced = torch.compiler.is_compiling() or peek_interpreter_stack() is not None
    if is_traced or type(x) not in (Tensor, Parameter) or not (start := x.data_ptr()):
        return None
    return span(start, x.shape, [step * x.itemsize for step in x.stride()], x.itemsize)


def shares_memory(one: Tensor, other: Tensor) -> bool:
    """See `gcx.backends.Backend`; it marks the bytes of one in a mask of both."""
    spans = find_span(one), find_span(other)
    if None in spans:
        return one is other
    low = min(start for start, _ in filter(None, spans))
    marks = torch.zeros(max(end for _, end in filter(None, spans)) - low, dtype=torch.bool)
    mine, its = (
        marks.as_strided(
            (*x.shape, x.itemsize), (*[s * x.itemsize for s in x.stride()], 1), x.data_ptr() - low
        )
        for x in (one, other)
    )
    mine.fill_(True)
    return bool(its.any())


def overlap(tensors: Sequence[Tensor]) -> bool:
    """Return True if tensors may share memory."""
    spans = sorted(filter(None, map(find_span, tensors)))
    return any(end > start for (_, end), (start, _) in pairwise(spans))
