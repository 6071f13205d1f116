"""The argument `out`: all checks, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gcx._dispatch import backend_for
from gcx._memory import find_shared
from gcx._names import naming
from gcx.backends import Backend


class Job(NamedTuple):
    name: str
    backend: Backend | None  # None without a gradient
    grad: Any
    seen: Any  # the gradient, reshaped if its layout splits an axis
    axes: tuple[int, ...]
    out: Any


def check_apart(jobs: Sequence[Job]) -> None:
    """Raise a ValueError if a result would be written over another array of the list."""
    uses = [
        (job.backend.find_memory(array), owner, array is job.out)
        for owner, job in enumerate(jobs)
        if job.backend is not None
        for array in ((job.out,) if job.out is job.grad else (job.grad, job.out))
    ]
    for one, other in find_shared(uses):
        raise ValueError(
            f"the out of {jobs[one].name} or {jobs[other].name} is in the memory of the other; "
            "give each result an array of its own"
        )


def check_out(out: Any, grad: Any, backend: Backend) -> None:
    if out is not grad:
        with naming("out"):
            found = backend_for(out)
            if found is backend:
                backend.check_dtype(out)
        if found is not backend:
            raise TypeError(f"out is a {type(out).__name__}, the gradient a {type(grad).__name__}")
    if not backend.is_writable(out, grad):
        raise TypeError(
            f"out cannot be written to: this {type(out).__name__} is immutable, read-only, an "
            "inference tensor, expanded or with elements that share memory; or autograd or "
            "torch.func watches (then use torch.no_grad(), or no out)"
        )
    if out is grad:
        return
    check_traits("out", out, "the gradient", grad, ("shape", "dtype", "device"))


def check_traits(what: str, x: Any, whose: str, model: Any, traits: Sequence[str]) -> None:
    for trait in traits:
        found: list[Any] = [getattr(array, trait, None) for array in (x, model)]
        if found[0] != found[1]:
            mine, theirs = [tuple(size) for size in found] if trait == "shape" else found
            raise ValueError(f"{what} has {trait} {mine}, {whose} {theirs}")
