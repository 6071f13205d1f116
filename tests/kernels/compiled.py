"""Kernels compiled by NVRTC for GPUs that are not here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from cuda.bindings import nvrtc


class Compiled(NamedTuple):
    """A kernel: its use of registers and memory, and its instructions in PTX."""

    registers: int
    stack: int
    spilled: int  # bytes that are stored, and loaded
    instructions: Counter[str]

    def count(self, pattern: str) -> int:
        """Count the instructions whose name matches a regular expression to its end."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))


def compile_kernel(source: str, options: Sequence[str]) -> Compiled:
    """Compile a kernel, and read what the assembler says about it."""
    program = _ask(nvrtc.nvrtcCreateProgram, source.encode(), b"kernels.cu", 0, [], [])
    flags = [option.encode() for option in (*options, "--ptxas-options=-v")]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    log = _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
    assert not int(error), log
    ptx = _text(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    nvrtc.nvrtcDestroyProgram(program)
    code = re.findall(r"^\s+(?:@!?%\w+ )?([a-z]\w*(?:\.\w+)*)\s", ptx, re.MULTILINE)
    stack, *spilled = _numbers(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    (registers,) = _numbers(r"Used (\d+) registers", log)
    return Compiled(registers, stack, sum(spilled), Counter(code))


def _numbers(pattern: str, log: str) -> list[int]:
    found = re.search(pattern, log)
    assert found, log
    return [int(number) for number in found.groups()]


def _text(program: Any, size_of: Any, get: Any) -> str:
    text = b" " * _ask(size_of, program)
    _ask(get, program, text)
    return text.decode().rstrip("\0")


def _ask(function: Any, *arguments: Any) -> Any:
    error, *values = function(*arguments)
    assert not int(error), error.name
    return values[0] if values else None
