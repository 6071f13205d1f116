"""All kernels, compiled for GPUs that are not here: registers, wide accesses, exact arithmetic."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
from cuda.bindings import nvrtc

from canonical_order import DTYPES
from launched import SOURCE, Variant
from rules_in_numpy import RULES


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


KERNELS = ("rows", "long_rows", "columns", "column_sums", "split_columns", "flat")

# Arrays that a rule reads, arrays that it writes, and its fused operations on an element.
TRAFFIC = {
    "Store": (1, 1, 0),
    "StoreRate": (1, 1, 0),
    "AdamW": (4, 3, 5),
    "Sgd": (2, 1, 1),
    "SgdRate": (2, 1, 2),
    "SgdMomentum": (3, 2, 3),
    "SgdMomentumRate": (3, 2, 4),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_nothing_to_find(architecture: int, dtype: str, rule: str) -> None:
    for kernel in KERNELS:
        variant = Variant(kernel, rule, dtype)
        found = findings(variant, compile_kernel(SOURCE, variant.options(64, architecture)))
        assert list(found) == [], (variant, architecture)


def findings(variant: Variant, compiled: Compiled) -> Iterator[str]:
    """Name the checks that a compiled kernel fails."""
    if compiled.registers > most_registers(variant):
        yield "registers"
    if compiled.stack or compiled.spilled:
        yield "spills"
    loads, stores, fused = expected_counts(variant)
    if compiled.count(r"ld\.global(\.nc)?\.v4\.\w+") != loads:
        yield "16-byte loads"
    if compiled.count(r"st\.global\.v4\.\w+") != stores:
        yield "16-byte stores"
    if compiled.count(r"fma\.rn\.f(32|64)") < fused:  # more, if the compiler doubles a branch
        yield "fused operations"
    # Without a rounding mode, the assembler may fuse a product and a sum.
    if compiled.count(r"(add|sub|mul|fma|mad)(\.ftz)?\.f(32|64)"):
        yield "contraction"
    if compiled.count(r"(div|sqrt|rcp|rsqrt)\.(full|approx).*"):
        yield "approximations"
    if compiled.count(r".*\.ftz\b.*"):
        yield "flushed subnormal numbers"


def most_registers(variant: Variant) -> int:
    """Give the limit for as many blocks on a multiprocessor as there should be."""
    if variant.rule.endswith("Rate"):
        return 128 if variant.pack == 8 else 80
    return 64 if variant.rule == "Store" and "rows" in variant.kernel else 80


def expected_counts(variant: Variant) -> tuple[int, int, int]:
    """Count loads and stores of 16 bytes, and fused operations, in the source."""
    kernel, rule, pack = variant.kernel, variant.rule, variant.pack
    reads, writes, fused = TRAFFIC[rule]
    has_rate = rule.endswith("Rate")
    packs = 4 if pack == 8 and "column" in kernel else 8  # that a thread holds
    is_summed = kernel not in {"flat", "split_columns"}
    is_held = rule == "Store" and kernel in {"rows", "columns", "split_columns"}
    loads = packs * (1 + has_rate) if is_summed else packs * is_held
    if kernel == "column_sums":
        return loads, 0, 0
    loads += 0 if is_held else reads
    return loads, writes * (packs if is_held else 1), pack * fused
