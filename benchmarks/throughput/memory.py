"""How much memory is to be had."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["free_bytes_of_host", "share_gpus"]

_MEMINFO = Path("/proc/meminfo")
_SMALL_MACHINE = 8 << 30  # what is taken for granted where nobody says how much there is


def share_gpus() -> None:
    """Keep JAX from taking most of the memory of all GPUs; call it before JAX is imported."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def free_bytes_of_host() -> int:
    """Memory that new arrays can take without anything being swapped out."""
    try:
        lines = _MEMINFO.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return _SMALL_MACHINE
    (available,) = (line for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(available.split()[1])
