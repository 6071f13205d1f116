"""Programs of their own, where a GPU that hangs or an error of memory ends nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

__all__ = ["outputs", "python"]


def outputs(
    commands: Sequence[Sequence[str]],
    *,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """Run programs all at once; return what they print.

    Raises
    ------
    RuntimeError
        If one ends with an error, or none after so many seconds; with its last line on stderr.
    """
    with ExitStack() as ended:
        started = [_started(command, environment, ended) for command in commands]
        try:
            printed = [process.communicate(timeout=seconds) for process in started]
        except subprocess.TimeoutExpired:
            msg = f"not done after {seconds:.0f} seconds: {' '.join(commands[0])}"
            raise RuntimeError(msg) from None
    for process, (out, err) in zip(started, printed, strict=True):
        if process.returncode:
            lines = (err or out).strip().splitlines() or [""]
            msg = f"exit code {process.returncode}: {lines[-1]}"
            raise RuntimeError(msg)
    return [out for out, _ in printed]


def _started(
    command: Sequence[str], environment: Mapping[str, str] | None, ended: ExitStack
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ended.enter_context(process)
    ended.callback(process.kill)  # which comes before it is waited for
    return process


def python(module: str, *arguments: str) -> list[str]:
    """Give the command that runs a module."""
    return [sys.executable, "-m", module, *arguments]
