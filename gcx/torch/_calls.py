"""Calls of hooks: kept out of torch.compile, with warnings that point at the line of the user."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from inspect import currentframe
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
ResultT = TypeVar("ResultT")


def not_compiled(function: Callable[P, ResultT]) -> Callable[P, ResultT]:
    """Keep a function out of what torch.compile compiles.

    For what must be looked at anew in each step, such as whether a model still holds its
    parameters: traced, it would be taken for constant.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> ResultT:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        # Not where the function is defined, since it loads the compiler, which takes seconds.
        as_it_is: Callable[P, ResultT] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return as_it_is(*args, **kwargs)

    return call


# The packages whose frames may lie between that line and gcx.
_TRAINERS = {"accelerate", "lightning", "pytorch_lightning", "transformers"}
_BETWEEN = frozenset({"copy", "gcx", "pickle", "torch"} | _TRAINERS)


def warn(message: str) -> None:
    """Warn where the user called, however many frames of gcx and torch lie between."""
    frame, level = currentframe(), 1
    while frame is not None and _package(frame.f_globals) in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _package(module: dict[str, object]) -> str:
    return str(module.get("__name__")).partition(".")[0]
