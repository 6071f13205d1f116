"""What the Triton kernel becomes on GPUs that are not here, as `MultiTensor` launches it.

It is compiled in processes of their own, by ``compile_triton.py``, since Triton interprets the
kernels where the other tests of them run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

THREADS = 256
_PROCESSES = 2
_LIMIT = 280.0  # seconds; a test has 300
_PROGRAM = Path(__file__).with_name("compile_triton.py")


class Case(NamedTuple):
    """One launch: a key of `compile_triton.RULES` and one of `compile_triton.TENSORS`."""

    rule: str
    dtype: str
    tensors: str
    arch: int  # compute capability, times ten

    def __str__(self) -> str:
        return f"{self.rule}, {self.dtype}, {self.tensors}, sm_{self.arch}"


class Program(NamedTuple):
    """What was compiled; instructions as they stand in the code."""

    tile: int  # elements
    registers: int  # of a thread
    spilled: int  # bytes of a thread
    wide_loads: int  # of tensors, 16 bytes each
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    inexact: list[str]  # arithmetic that is not rounded once, as IEEE 754 says
    atomics: list[str]

    @property
    def tiles_at_once(self) -> int:
        """How many tiles a multiprocessor holds, of which each has 64 Ki registers.

        A warp gets them by the 256, that is, a thread by the eight.
        """
        return (1 << 16) // (THREADS * -(-self.registers // 8) * 8)


def compile_all(cases: Sequence[Case], package: Path | None = None) -> dict[Case, Program]:
    """Compile for each case the kernel of the installed gcx, or of one in the folder `package`."""
    shares = [cases[k::_PROCESSES] for k in range(min(_PROCESSES, len(cases)))]
    with ThreadPoolExecutor(_PROCESSES) as pool:
        answers = list(pool.map(lambda share: _compiled(share, package), shares))
    return {
        case: Program(*facts)
        for share, answer in zip(shares, answers, strict=True)
        for case, facts in zip(share, answer, strict=True)
    }


def _compiled(cases: Sequence[Case], package: Path | None) -> list[list[object]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if package is not None:
        environment["PYTHONPATH"] = str(package)
    done = subprocess.run(
        [sys.executable, str(_PROGRAM), json.dumps(cases)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: list[list[object]] = json.loads(done.stdout)
    return answer
