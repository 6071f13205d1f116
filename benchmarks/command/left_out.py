"""What a command could not do, said aloud."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gcx._table import aligned

__all__ = ["LeftOut", "left_out_lines"]


@dataclass(frozen=True)
class LeftOut:
    """Something that did not run, and why; `ok` unless it should have."""

    ok: bool
    what: str
    why: str


def left_out_lines(left_out: Sequence[LeftOut]) -> list[str]:
    """Write one line for each, under a heading; nothing if all has run."""
    if not left_out:
        return []
    rows = [(f"  {item.what}", item.why if item.ok else f"FAILED: {item.why}") for item in left_out]
    return ["Not run:", *aligned(rows), ""]
