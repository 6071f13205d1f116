"""Double precision for one stretch of a program, the setting of the process untouched."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

__all__ = ["double_precision"]


def double_precision(libraries: Collection[str]) -> AbstractContextManager[Any]:
    """Let all of `libraries` make float64 arrays inside the ``with`` block.

    JAX is the one that has to be asked for it, and is imported if it is among them.
    """
    if "jax" not in libraries:
        return nullcontext()
    from gcx.backends import _jax

    return _jax.double_precision()
