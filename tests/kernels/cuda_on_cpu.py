"""CuPy with NumPy's arrays, whose kernels run on the CPU: the whole of the backend without a GPU.

A kernel is compiled by g++ with the header that stands for CUDA (see `cuda_on_cpu.h`). A launch is
a process, which is sent all memory that it may touch, and sends it back; so sanitizers can watch.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cupy_stand_in
from cupy_stand_in import StandIn

HERE = Path(__file__).parent

COMPILER = ("g++", "-std=c++17", "-O1", "-ffp-contract=off", "-pthread")

Flags = tuple[str, ...]  # of the compiler
SANITIZERS: dict[str, Flags] = {
    "thread": ("-fsanitize=thread", "-g"),
    "memory": ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"),
}

STOPPING = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}

Edit = Callable[[str], str]  # of the source of a kernel


class Kernel:
    """A program that makes one launch, called as kernels of CuPy are."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self.blocks: list[int] = []  # of the launches so far
        self.arguments: tuple[Any, ...] = ()  # of the last one

    def __call__(self, grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
        self.arguments = arguments
        addresses, *tables, strength = arguments
        pointers = [table.data.ptr for table in tables]
        regions = list(_regions(cupy_stand_in.addressed.values()))
        cupy_stand_in.addressed.clear()
        self.blocks.append(grid[0])
        sent = [struct.pack("Q", len(regions))]
        for start, end in regions:
            sent += struct.pack("QQ", start, end - start), ctypes.string_at(start, end - start)
        sent += struct.pack("Q", grid[0]), addresses.tobytes(), struct.pack("4Q", *pointers)
        sent.append(strength.tobytes())
        done = subprocess.run(
            [self.program], input=b"".join(sent), capture_output=True, check=False, env=STOPPING
        )
        if done.returncode:
            raise LaunchError(done.stderr.decode())
        left = memoryview(done.stdout)
        for start, end in regions:
            ctypes.memmove(start, bytes(left[: end - start]), end - start)
            left = left[end - start :]
        assert not left


class LaunchError(Exception):
    """A launch has failed, as the report of a sanitizer says."""


def _regions(arrays: Any) -> Iterator[tuple[int, int]]:
    """Addresses where memory begins and ends, for arrays that may share it."""
    bounds = sorted(np.lib.array_utils.byte_bounds(array) for array in arrays if array.size)
    start, end = bounds[0]
    for low, high in bounds:
        if low > end:
            yield start, end
            start, end = low, high
        end = max(end, high)
    yield start, end


@cache
def program(source: str, definitions: Flags, flags: Flags, folder: Path) -> Path:
    """Compile a kernel, once."""
    number = len(list(folder.glob("*.cu")))
    kernel = folder / f"{number}.cu"
    kernel.write_text(source)
    result = folder / f"{number}.out"
    with_kernel = (*definitions, f'-DSOURCE="{kernel}"', HERE / "cuda_on_cpu.cpp")
    subprocess.run([*COMPILER, *flags, *with_kernel, "-o", result], check=True)
    return result


class CupyOnCpu(StandIn):
    """NumPy in the place of CuPy, with kernels."""

    def __init__(self, folder: Path, flags: Flags, edit: Edit) -> None:
        super().__init__()
        self.kernels: dict[str, Kernel] = {}  # by type of element
        self._build = lambda code, options: Kernel(
            program(edit(code), tuple(o for o in options if o.startswith("-D")), flags, folder)
        )

    def RawModule(self, *, code: str, options: tuple[str, ...]) -> Any:
        def get_function(name: str) -> Kernel:
            assert name in code
            (element,) = (o.partition("=")[2] for o in options if o.startswith("-DELEMENT="))
            return self.kernels.setdefault(element, self._build(code, options))

        return SimpleNamespace(get_function=get_function)


def install(
    patch: pytest.MonkeyPatch, folder: Path, flags: Flags = (), edit: Edit = str
) -> CupyOnCpu:
    """Let gcx take this for CuPy, with the source of the kernel as `edit` leaves it."""
    cupy = CupyOnCpu(folder, flags, edit)
    cupy_stand_in.install(patch, cupy)
    return cupy
