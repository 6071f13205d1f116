"""The argument `out`: all checks, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gcx._dispatch import backend_for
from gcx._names import naming
from gcx.backends import Backend
from gcx.backends._memory import Use, find_meetings


class Job(NamedTuple):
    name: str
    backend: Backend | None  # None without a gradient
    grad: Any
    seen: Any  # the gradient, reshaped if its layout splits an axis
    axes: tuple[int, ...]
    out: Any


def check_apart(jobs: Sequence[Job]) -> None:
    """Raise a ValueError if a result would be written over another array of the list."""
    uses: list[Use] = []
    for owner, job in enumerate(jobs):
        for array in {id(x): x for x in (job.grad, job.out) if x is not None}.values():
            assert job.backend is not None
            start, end = job.backend.find_span(array) or (id(array), id(array) + 1)
            uses.append((start, end, owner, array, array is job.out))
    for (*_, one, mine, _), (*_, other, its, _) in find_meetings(uses):
        backend = jobs[one].backend
        assert backend is not None
        if mine is its or jobs[other].backend is not backend or backend.shares_memory(mine, its):
            msg = (
                f"the out of {jobs[one].name} or {jobs[other].name} is in the memory of the other; "
                "give each result an array of its own"
            )
            raise ValueError(msg)


def check_out(out: Any, grad: Any, backend: Backend) -> None:
    if out is not grad:
        with naming("out"):
            found = backend_for(out)
            if found is backend:
                backend.check_dtype(out)
        if found is not backend:
            msg = f"out is a {type(out).__name__}, the gradient a {type(grad).__name__}"
            raise TypeError(msg)
    if not backend.is_writable(out, grad):
        msg = (
            f"out cannot be written to: this {type(out).__name__} is immutable, read-only, an "
            "inference tensor, expanded or with elements that share memory; or autograd or "
            "torch.func watches (then use torch.no_grad(), or no out)"
        )
        raise TypeError(msg)
    if out is grad:
        return
    for trait in ("shape", "dtype", "device"):
        mine, theirs = getattr(out, trait, None), getattr(grad, trait, None)
        if mine != theirs:
            msg = f"out has {trait} {mine}, the gradient {theirs}"
            raise ValueError(msg)
