"""Compiled kernels, kept in a cache on disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from threading import get_ident
from typing import TypeVar

from gcx.backends.cuda.drivers import Driver
from gcx.backends.cuda.tables import ELEMENTS

T = TypeVar("T")

_DIGEST = sha256().digest_size


@cache
def read_source() -> str:
    """Return the source of all kernels."""
    return files(__package__).joinpath("kernels.cu").read_text(encoding="utf-8")


def make_options(
    kernel: str, rule: str, dtype: str, matrices: int, capability: tuple[int, int]
) -> list[str]:
    """List the options of NVRTC for one kernel. None of them allows less exact arithmetic."""
    constants = {"ELEMENT": ELEMENTS[dtype], "KERNEL": kernel, "RULE": rule, "MATRICES": matrices}
    target = "".join(map(str, capability))
    definitions = [f"-D{name}={value}" for name, value in constants.items()]
    return [f"--gpu-architecture=sm_{target}", "-std=c++17", "--fmad=false", *definitions]


def load_kernel(driver: Driver, options: list[str], load: Callable[[bytes], T]) -> T:
    """Load a kernel from the cache; compile it if it is not there, or does not load."""
    source = read_source()
    text = "\n".join([str(driver.versions()[0]), *options, source])
    name = f"{sha256(text.encode()).hexdigest()}.cubin"
    try:
        kept = (_find_cache() / name).read_bytes()
        code = kept[_DIGEST:]
        if sha256(code).digest() == kept[:_DIGEST]:  # a driver may crash on half of a kernel
            return load(code)
    except (OSError, RuntimeError) as error:  # a RuntimeError: no home, or a failure to load
        if "OUT_OF_MEMORY" in str(error):
            raise
    code = driver.compile(source, options)
    with suppress(OSError, RuntimeError):
        _write(_find_cache() / name, sha256(code).digest() + code)
    return load(code)


def _write(file: Path, code: bytes) -> None:
    """Write a file in one step, since other processes may read it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.{get_ident()}")
    try:
        part.write_bytes(code)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _find_cache() -> Path:
    """Find the user's folder for caches."""
    chosen = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (Path(chosen) if chosen else Path.home() / ".cache") / "gcx"
