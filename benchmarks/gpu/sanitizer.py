"""NVIDIA's compute-sanitizer: accesses out of bounds, and races in shared memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from shutil import which

from benchmarks.gpu.device import Gpu
from benchmarks.gpu.programs import outputs, python
from benchmarks.gpu.report import Measured, NotRunError

__all__ = ["memcheck", "racecheck"]

_SECONDS = 100
_FOUND = 9  # exit code of the sanitizer where it found an error


def memcheck(gpu: Gpu) -> Iterator[Measured]:
    """Look for accesses out of bounds."""
    return _checked(gpu, "memcheck")


def racecheck(gpu: Gpu) -> Iterator[Measured]:
    """Look for races in shared memory."""
    return _checked(gpu, "racecheck")


def _checked(gpu: Gpu, tool: str) -> Iterator[Measured]:
    if gpu.is_brief:
        msg = "not with --brief"
        raise NotRunError(msg)
    sanitizer = which("compute-sanitizer")
    if sanitizer is None:
        msg = "compute-sanitizer is not on the PATH"
        raise NotRunError(msg)
    program = python("benchmarks.gpu.small", gpu.device)
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(_FOUND), *program]
    # Memory of torch's pools has no bounds that could be seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    outputs([command], seconds=min(_SECONDS, gpu.seconds_left()), environment=environment)
    yield Measured(f"{tool}: errors", 0, 0)
