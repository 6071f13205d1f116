"""The libraries of a command: those it leaves out, and double precision in the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from gcx.__main__ import LibraryInfo
from gcx.plan import aligned

__all__ = ["LeftOut", "double_precision", "left_out_lines", "unusable"]


@dataclass(frozen=True)
class LeftOut:
    """Something that did not run, and why; `ok` unless it should have."""

    ok: bool
    what: str
    why: str


def unusable(libraries: Iterable[LibraryInfo]) -> list[LeftOut]:
    """List those that are not here, have no device, or are broken, which alone is a failure."""
    return [
        LeftOut(library.state != "broken", library.name, library.how)
        for library in libraries
        if library.state != "ok"
    ]


def left_out_lines(left_out: Sequence[LeftOut]) -> list[str]:
    """Write one line for each, under a heading; nothing if all has run."""
    if not left_out:
        return []
    rows = [(f"  {item.what}", item.why if item.ok else f"FAILED: {item.why}") for item in left_out]
    return ["Not run:", *aligned(rows), ""]


def double_precision(libraries: Collection[str]) -> AbstractContextManager[Any]:
    """Let all of `libraries` make float64 arrays inside the ``with`` block.

    JAX is the one that has to be asked for it, and is imported if it is among them.
    """
    if "jax" not in libraries:
        return nullcontext()
    import jax
    import jax.experimental

    # Before 0.8 it is in jax.experimental.
    home = jax if hasattr(jax, "enable_x64") else jax.experimental
    context: AbstractContextManager[Any] = home.enable_x64(True)
    return context
