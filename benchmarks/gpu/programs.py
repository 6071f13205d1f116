"""Checks in processes of their own, so that a GPU that hangs ends nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from shutil import which

from benchmarks.gpu.device import Gpu
from benchmarks.gpu.report import Measured, NotRunError

__all__ = ["memcheck", "outputs", "racecheck", "two_processes", "two_streams"]

_LAUNCHES = 2000
_STRESS_SECONDS = 150  # with the start and the compiler; the launches alone have 60
_SANITIZER_SECONDS = 100


def two_streams(gpu: Gpu) -> Iterator[Measured]:
    """Launch beside another stream of the process, which keeps the GPU busy."""
    return _stress(gpu, "beside a busy stream", processes=1)


def two_processes(gpu: Gpu) -> Iterator[Measured]:
    """Do so in two processes at once."""
    return _stress(gpu, "in two processes at once", processes=2)


def memcheck(gpu: Gpu) -> Iterator[Measured]:
    """Look for accesses out of bounds."""
    return _inspect(gpu, "memcheck")


def racecheck(gpu: Gpu) -> Iterator[Measured]:
    """Look for races in shared memory."""
    return _inspect(gpu, "racecheck")


def _stress(gpu: Gpu, where: str, *, processes: int) -> Iterator[Measured]:
    launches = _LAUNCHES // 10 if gpu.is_brief else _LAUNCHES
    command = [sys.executable, "-m", "benchmarks.gpu.stress", gpu.device, str(launches)]
    seconds = min(_STRESS_SECONDS, gpu.seconds_left())
    printed = [json.loads(out) for out in outputs([command] * processes, seconds=seconds)]
    made = sum(each["launches"] for each in printed)
    wrong = sum(each["wrong"] for each in printed)
    yield Measured(f"launches {where}", made, processes * launches, "done", at_least=True)
    yield Measured(f"gradients {where}", wrong, 0, "differ")


def _inspect(gpu: Gpu, tool: str) -> Iterator[Measured]:
    if gpu.is_brief:
        raise NotRunError("only with --check")
    sanitizer = which("compute-sanitizer")
    if sanitizer is None:
        raise NotRunError("compute-sanitizer is not on the PATH")
    # torch and CUDA's libraries ask the driver for things that it may refuse, which is no error.
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    command = [sanitizer, *options, sys.executable, "-m", "benchmarks.gpu.bits", gpu.device]
    # The sanitizer knows no bounds within the memory that torch keeps.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    seconds = min(_SANITIZER_SECONDS, gpu.seconds_left())
    outputs([command], seconds=seconds, environment=environment)
    yield Measured(f"{tool}: errors", 0, 0)


def outputs(
    commands: Sequence[Sequence[str]],
    *,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """Run programs all at once; return their output.

    Raises
    ------
    RuntimeError
        If one ends with an error, or none after so many seconds; with its last line on stderr.
    """
    with ExitStack() as ended:
        started = [_start(command, environment, ended) for command in commands]
        try:
            printed = [process.communicate(timeout=seconds) for process in started]
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"not done after {seconds:.0f} seconds: {' '.join(commands[0])}"
            ) from None
    for process, (out, err) in zip(started, printed, strict=True):
        if process.returncode:
            lines = (err or out).strip().splitlines() or [""]
            raise RuntimeError(f"exit code {process.returncode}: {lines[-1]}")
    return [out for out, _ in printed]


def _start(
    command: Sequence[str], environment: Mapping[str, str] | None, ended: ExitStack
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ended.enter_context(process)
    ended.callback(process.kill)  # which comes before it is waited for
    return process
