"""Launches on a GPU that others use: nothing may hang, and no bit may differ."""

from __future__ import annotations

import json
from collections.abc import Iterator

from benchmarks.gpu.device import Gpu
from benchmarks.gpu.programs import outputs, python
from benchmarks.gpu.report import Measured

__all__ = ["two_processes", "two_streams"]

_LAUNCHES = 2000
_SECONDS = 150  # with what it takes to start and to compile; the launches alone have 60


def two_streams(gpu: Gpu) -> Iterator[Measured]:
    """Launch beside another stream of the process, which keeps the GPU busy."""
    return _stressed(gpu, "beside a busy stream", processes=1)


def two_processes(gpu: Gpu) -> Iterator[Measured]:
    """Do so in two processes at once."""
    return _stressed(gpu, "in two processes at once", processes=2)


def _stressed(gpu: Gpu, where: str, *, processes: int) -> Iterator[Measured]:
    launches = _LAUNCHES // 10 if gpu.is_brief else _LAUNCHES
    command = python("benchmarks.gpu.stress", gpu.device, str(launches))
    seconds = min(_SECONDS, gpu.seconds_left())
    printed = [json.loads(out) for out in outputs([command] * processes, seconds=seconds)]
    made = sum(each["launches"] for each in printed)
    wrong = sum(each["wrong"] for each in printed)
    yield Measured(f"launches {where}", made, processes * launches, "done", at_least=True)
    yield Measured(f"gradients {where}", wrong, 0, "differ")
