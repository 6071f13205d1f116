"""Functions that torch.compile is to call as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
ResultT = TypeVar("ResultT")


def untraced(function: Callable[P, ResultT]) -> Callable[P, ResultT]:
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
