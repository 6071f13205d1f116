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

from gcx.backends._canonical import SEGMENT
from gcx.backends._tiles import ROW_LENGTHS

THREADS = 256
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_PROCESSES = 2
_LIMIT = 280.0  # seconds; a test has 300
_PROGRAM = Path(__file__).with_name("compile_triton.py")


class Use(NamedTuple):
    """How many tensors of a weight a rule reads, sums, and writes."""

    read: int
    summed: int
    written: int
    has_flat: bool = True  # whether there is something to do where nothing is centralized


# As in `compile_triton.RULES`.
USES = {
    "centralize": Use(1, 1, 1, has_flat=False),
    "coupled": Use(1, 2, 1, has_flat=False),
    "sgd": Use(2, 2, 1),
    "momentum": Use(3, 2, 2),
    "adamw": Use(4, 1, 3),
}

_SCRATCH_STORES = 3  # sums of gradients and of weights, and the counter

# With fewer bytes on their way to a multiprocessor, the memory of an H200 is not busy: 4.3 TB/s, of
# which half are reads, take 0.7 us to arrive at 132 of them.
_BYTES_ON_THEIR_WAY = 12_000
# ptxas may put away a register or four, once a tile, to make room for one more tile.
_SPILLED_AT_MOST = 16


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
    first_loads: int  # wide ones, of a tile of columns that leaves the rest to another one
    wide_stores: int
    narrow_stores: int
    inexact: list[str]  # arithmetic that is not rounded once, as IEEE 754 says
    atomics: list[str]
    leaves_sums_first: bool  # before it counts itself, and reads those of others afterwards

    @property
    def tiles_at_once(self) -> int:
        """How many tiles a multiprocessor holds, of which each has 64 Ki registers.

        A warp gets them by the 256, that is, a thread by the eight.
        """
        return (1 << 16) // (THREADS * -(-self.registers // 8) * 8)


def flaws(case: Case, program: Program) -> dict[str, str]:
    """Tell what is wrong with a program."""
    found = {}
    if program.inexact:
        found["arithmetic"] = f"not rounded once: {program.inexact}"
    if program.atomics != ["atom.global.gpu.acq_rel.add.u32"] or not program.leaves_sums_first:
        found["order"] = f"a tile may not see what others have left: {program.atomics}"
    if case.tensors == "even":
        if flaw := _flaw_of_accesses(case, program):
            found["accesses"] = flaw
        if program.spilled > _SPILLED_AT_MOST:
            found["spilled"] = f"{program.spilled} bytes"
    if flaw := _flaw_of_registers(case, program):
        found["registers"] = flaw
    return found


def _flaw_of_accesses(case: Case, program: Program) -> str:
    loads, stores = _loads(case, program.tile), _stores(case, program.tile)
    if program.narrow_loads or program.wide_loads > loads:
        return (
            f"{program.wide_loads} and {program.narrow_loads} loads, wide and narrow, not {loads}"
        )
    summed = USES[case.rule].summed * _accesses(case, program.tile)
    if program.first_loads != summed:
        return f"{program.first_loads} loads before a tile is counted, not {summed}"
    if program.narrow_stores > _SCRATCH_STORES or program.wide_stores > stores:
        return f"{program.wide_stores} and {program.narrow_stores} stores, not {stores}"
    return ""


def _flaw_of_registers(case: Case, program: Program) -> str:
    use = USES[case.rule]
    tiles = program.tiles_at_once
    bytes_of_tiles = tiles * program.tile * ITEMSIZE[case.dtype] * max(use.read, use.summed)
    # While one tile is on its way, another one is added up and written; elsewhere, memory waits for
    # the many instructions that it takes to read one element at a time.
    at_once = 2 if case.tensors == "even" else 1
    if tiles >= at_once and bytes_of_tiles >= at_once * _BYTES_ON_THEIR_WAY:
        return ""
    return f"{program.registers}, so {tiles} tiles at once, of {bytes_of_tiles} bytes together"


def _loads(case: Case, tile: int) -> int:
    """Count the loads of a program that reads nothing twice without need.

    Rows are read once, and so are columns in one piece. Long rows are read to add up a segment,
    and again; columns in several pieces, to add them up, and again.
    """
    use = USES[case.rule]
    once = max(use.read, use.summed)
    long = SEGMENT // tile * use.summed + use.read
    columns = once + use.summed + use.read
    flat = use.read * use.has_flat
    return (ROW_LENGTHS * once + long + columns + flat) * _accesses(case, tile)


def _stores(case: Case, tile: int) -> int:
    """Count the stores: for rows, long rows, columns in one piece and in several, and flat ones.

    Besides there are those of the sums of a piece, and of the counter of pieces.
    """
    use = USES[case.rule]
    return (ROW_LENGTHS + 3 + use.has_flat) * use.written * _accesses(case, tile)


def _accesses(case: Case, tile: int) -> int:
    return tile * ITEMSIZE[case.dtype] // (16 * THREADS)


def compile_all(cases: Sequence[Case], folder: Path | None = None) -> dict[Case, Program]:
    """Compile, for each case, the kernel of the installed gcx or of the one in a folder."""
    shares = [cases[k::_PROCESSES] for k in range(min(_PROCESSES, len(cases)))]
    with ThreadPoolExecutor(_PROCESSES) as pool:
        answers = list(pool.map(lambda share: _compiled(share, folder), shares))
    return {
        case: Program(*facts)
        for share, answer in zip(shares, answers, strict=True)
        for case, facts in zip(share, answer, strict=True)
    }


def _compiled(cases: Sequence[Case], folder: Path | None) -> list[list[object]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if folder is not None:
        environment["PYTHONPATH"] = str(folder)
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
