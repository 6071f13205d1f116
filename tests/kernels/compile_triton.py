"""Compile the Triton kernel for GPUs that are not here; see ``triton_programs.py``.

The host's own code launches the kernel, with tensors on the CPU, and the launch ends when the
program for it is there. Takes a list of cases in JSON, and prints a list of programs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from gcx.backends import _torch_triton, _triton_kernels

from triton_programs import THREADS, Case, Program

_TOOLS = Path(nvidia.__file__).parent / "bin"

_SGD = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.0,
    "weight_decay": 0.01,
    "nesterov": True,
    "maximize": False,
    "first": False,
}
_ADAMW = {
    "step_size": 0.1,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "decay": 0.01,
    "bias2_root": 0.1,
    "maximize": False,
}
# Rule, number of roles, and scalars of a `MultiTensor`.
RULES: dict[str, tuple[str, int, dict[str, float]]] = {
    "centralize": ("centralize", 3, {"strength": 1.0, "rate": 0.0}),
    "coupled": ("centralize", 3, {"strength": 1.0, "rate": 0.01}),
    "sgd": ("sgd", 2, _SGD),
    "momentum": ("sgd", 3, _SGD),
    "adamw": ("adamw", 4, _ADAMW),
}


def _even(dtype: torch.dtype) -> list[tuple[Tensor, tuple[int, ...]]]:
    """Rows, columns, and what is not centralized; each of them in whole pieces of 16 bytes."""
    matrix, bias = torch.zeros(64, 64, dtype=dtype), torch.zeros(64, dtype=dtype)
    return [(matrix, (1,)), (matrix, (0,)), (bias, ())]


def _shifted(dtype: torch.dtype) -> list[tuple[Tensor, tuple[int, ...]]]:
    """The same, one element behind where a piece begins."""
    return [
        (torch.zeros(1 + tensor.numel(), dtype=dtype)[1:].view(tensor.shape), axes)
        for tensor, axes in _even(dtype)
    ]


def _odd(dtype: torch.dtype) -> list[tuple[Tensor, tuple[int, ...]]]:
    """Rows, columns, and rows whose elements lie in runs, of lengths that are no whole pieces."""
    shapes = [((5, 7), (1,)), ((5, 7), (0,)), ((5, 7, 3), (0, 2)), ((7,), ())]
    return [(torch.zeros(shape, dtype=dtype), axes) for shape, axes in shapes]


TENSORS: dict[str, Callable[[torch.dtype], list[tuple[Tensor, tuple[int, ...]]]]] = {
    "even": _even,
    "shifted": _shifted,
    "odd": _odd,
}


class Gpu:
    """As much of a driver of Triton as it takes to compile."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return self._arch  # which is what Triton keeps programs by

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)


class Kernel:
    """In the place of the kernel: is compiled the same way, but never launched."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, int]] = []

    def warmup(
        self, *arguments: Any, grid: tuple[int], **options: Any
    ) -> dict[tuple[int], Callable[..., None]]:
        tile = dict(zip(_MULTI_TENSOR.arg_names, arguments, strict=True))["TILE"]
        self.compiled.append((_MULTI_TENSOR.warmup(*arguments, grid=grid, **options), tile))
        return {grid: lambda *_: None}


_MULTI_TENSOR = _triton_kernels.multi_tensor


def compile_case(case: Case) -> Program:
    """Launch, and look at what would run."""
    driver.set_active(Gpu(case.arch))
    _triton_kernels.multi_tensor = kernel = Kernel()
    rule, roles, scalars = RULES[case.rule]
    tensors = TENSORS[case.tensors](getattr(torch, case.dtype))
    if rule == "centralize":
        tensors = [(tensor, axes) for tensor, axes in tensors if axes]
    lists = [[tensor for tensor, _ in tensors]] * roles
    launch = _torch_triton.MultiTensor(rule, lists, [axes for _, axes in tensors], any_order=False)
    launch.run(lists, **scalars)
    ((compiled, tile),) = kernel.compiled
    return _described(compiled, tile)


def _described(compiled: Any, tile: int) -> Program:
    code = compiled.asm["ptx"]
    assert f".reqntid {THREADS}\n" in code
    registers, spilled = _resources(compiled.asm["cubin"])
    loads = [load for load in re.findall(r"@%p\d+ ld\.global\.([\w.]+)", code) if "cg" not in load]
    stores = re.findall(r"@%p\d+ st\.global\.([\w.]+)", code)
    wide = ("v4.b32", "v2.b64")
    arithmetic = re.findall(r"\b(?:add|sub|mul|div|sqrt|fma|mad|rcp|rsqrt|ex2|cvt)\.[\w.]+", code)
    return Program(
        tile=tile,
        registers=registers,
        spilled=spilled,
        wide_loads=sum(load in wide for load in loads),
        narrow_loads=sum(load not in wide for load in loads),
        first_loads=sum(_before_counting(code).count(f"ld.global.{load}") for load in wide),
        wide_stores=sum(store in wide for store in stores),
        narrow_stores=sum(store not in wide for store in stores),
        inexact=sorted({name for name in arithmetic if not _is_exact(name)}),
        atomics=re.findall(r"\batom[\w.:]+", code),
        leaves_sums_first=_leaves_sums_first(code),
    )


def _leaves_sums_first(code: str) -> bool:
    """Whether all threads have stored what they leave before one of them counts the tile.

    And whether all wait for it before they read.
    """
    before, after = re.split(r"\batom\.", code)
    block = before.rpartition("$L__BB")[2]  # as far as nothing jumps to
    stored = re.findall(r"st\.global\.b|bar\.sync", block)
    read = re.findall(r"ld\.shared|ld\.global|bar\.sync", after)
    waits_before = stored.count("st.global.b") == 2 and stored[-1] == "bar.sync"
    return waits_before and read[0] == "bar.sync"


def _before_counting(code: str) -> str:
    """Return what a tile that counts itself has run by then, whichever way it went.

    That is in the blocks of instructions that no way to the atomic operation passes by.
    """
    table = re.search(r"\.branchtargets[^;]*;", code)  # of jumps to the kinds
    assert table is not None
    body = code[table.end() :].replace("JTI0_0", table[0])
    jumps_marked = re.sub(r"(?m)^\t(@%p\d+ )?br[ax]\b[^;]*;", r"\g<0>\f", body)
    blocks = re.split(r"(?m)\f|^(?=\$L__BB\w+:)", jumps_marked)
    (counting,) = (k for k, block in enumerate(blocks) if "atom." in block)
    ways = _ways(blocks)
    passed = [k for k in range(len(blocks)) if counting not in _reached(ways, without=k)]
    return "".join(blocks[k].partition("atom.")[0] for k in passed)


def _ways(blocks: list[str]) -> list[list[int]]:
    """List for each block those that may be run next."""
    places = {block.partition(":")[0]: k for k, block in enumerate(blocks)}
    ways = []
    for k, block in enumerate(blocks):
        jumps = [places[label] for label in re.findall(r"\$L__BB\w+\b(?!:)", block)]
        runs_on = re.search(r"(?m)^\t(br[ax]|ret)\b", block) is None
        ways.append([*jumps, k + 1] if runs_on else jumps)
    return ways


def _reached(ways: list[list[int]], *, without: int) -> set[int]:
    """Find the blocks that can be run if one of them cannot."""
    reached: set[int] = set()
    found = {0} - {without}
    while found:
        reached |= found
        found = {way for k in found for way in ways[k]} - reached - {without}
    return reached


def _is_exact(instruction: str) -> bool:
    """Whether an instruction is for integers, or rounds as IEEE 754 says."""
    if not re.search(r"\.b?f\d", instruction):
        return True
    # add.rn.f32.bf16 widens what it adds.
    rounded_once = r"(add|sub)\.rn\.f32\.b?f16|(add|sub|mul|div|sqrt)\.rn\.(f32|f64|f32x2)"
    converted = r"cvt\.rn\.[\w.]+|cvt\.(f32\.b?f16|f64\.b?f16|f64\.f32)"
    return re.fullmatch(f"{rounded_once}|{converted}", instruction) is not None


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of the stack and of local memory: a kernel that spills has some."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        told = subprocess.run(
            [_TOOLS / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    assert found is not None, told
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def main() -> None:
    """Compile each case, as if a GPU were here."""
    _torch_triton._on = lambda device: nullcontext()
    _torch_triton._stream = lambda: 0
    _torch_triton._pin = lambda table: table
    _torch_triton._send = lambda table, device, waits=True: table
    cases = [Case(*case) for case in json.loads(sys.argv[1])]
    print(json.dumps([compile_case(case) for case in cases]))


if __name__ == "__main__":
    main()
