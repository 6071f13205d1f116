"""PyTorch: the memory of tensors, and whether it can be written to."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.forward_ad import unpack_dual

from gcx._memory import Memory, find_span, repeats_itself
from gcx.backends._torch_dtensor import PLAIN

_find_base: Callable[[Tensor], Tensor | None] = attrgetter("_base")  # of a view


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
