"""A CUDA driver that runs kernels.cu on the CPU, in the memory of NumPy's arrays or CPU tensors.

g++ compiles the source; `kernels/cuda_on_cpu.h` replaces CUDA. The libraries are kept.
"""

from __future__ import annotations

import ctypes
import getpass
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

HERE = Path(__file__).parent / "kernels"
KEPT = Path(tempfile.gettempdir()) / f"emulated-cuda-{getpass.getuser()}"

COMPILER = ("g++", "-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-shared")
SANITIZED = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

_running = Lock()  # all launches share the fibers of a library


class Launch(NamedTuple):
    """A launch, and the number of its accesses to arrays: of 16 bytes, and of fewer."""

    kernel: str
    rule: str
    element: str
    blocks: int
    threads: int
    stream: int
    device: int
    packed: int
    elementwise: int


class Function(NamedTuple):
    """A kernel in a library."""

    library: str
    kernel: str
    rule: str
    element: str
    matrices: int  # the most that its parameters can hold


class EmulatedDriver:
    """Compile, load and launch as a CUDA driver does, and keep a list of the launches.

    `flags` are for g++. Blocks and threads may run in `falling` order: only races show it.
    """

    def __init__(self, flags: Sequence[str] = (), *, falling: bool = False) -> None:
        self.flags = tuple(flags)
        self.falling = falling
        self.launches: list[Launch] = []

    def versions(self) -> tuple[int, int]:
        return 13000, 13000

    def compile(self, source: str, options: Sequence[str]) -> bytes:
        """Compile all kernels for one rule and one type of element."""
        assert "--fmad=false" in options
        given = dict(option[2:].split("=") for option in options if option.startswith("-D"))
        element, rule = given["ELEMENT"], given["RULE"]
        library = _library(source, (f"-DELEMENT={element}", f"-DRULE={rule}", *self.flags))
        matrices = int(given["MATRICES"])
        return json.dumps([str(library), given["KERNEL"], rule, element, matrices]).encode()

    def load(self, device: int, code: bytes) -> Function:
        function = Function(*json.loads(code))
        _loaded(function.library)
        return function

    def launch(self, device: int, function: Function, arguments: tuple[int, ...], /) -> None:
        blocks, _, _, threads, _, _, _, stream, parameters, _ = arguments
        work = ctypes.c_void_p.from_address(parameters)
        name, counts = function.kernel.encode(), (ctypes.c_longlong * 2)()
        with _running:
            fault = _loaded(function.library).emulate(
                name, function.matrices, blocks, threads, self.falling, work, counts
            )
        if fault:
            raise RuntimeError(fault.decode())
        shape = blocks, threads, stream, device
        self.launches.append(
            Launch(function.kernel, function.rule, function.element, *shape, *counts)
        )


def _library(source: str, flags: tuple[str, ...]) -> Path:
    """Compile, unless it is there from an earlier run."""
    parts = [(HERE / f"cuda_on_cpu.{end}").read_text() for end in ("h", "cpp")]
    name = hashlib.sha256("\0".join([source, *parts, *COMPILER, *flags]).encode()).hexdigest()
    library = KEPT / f"{name}.so"
    if not library.exists():
        KEPT.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as folder:
            kernels, result = Path(folder, "kernels.cu"), Path(folder, "kernels.so")
            kernels.write_text(source)
            included = ("-Wno-unknown-pragmas", f'-DSOURCE="{kernels}"', HERE / "cuda_on_cpu.cpp")
            subprocess.run([*COMPILER, *flags, *included, "-o", result], check=True)
            result.replace(library)
    return library


@cache
def _loaded(library: str) -> Any:
    loaded = ctypes.CDLL(library)
    loaded.emulate.restype = ctypes.c_char_p
    loaded.emulate.argtypes = (
        *(ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_bool),
        *(ctypes.c_void_p, ctypes.c_void_p),
    )
    return loaded
