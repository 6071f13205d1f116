"""Kernels compiled and launched, for lists of arrays whose shapes and strides are known."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from ctypes import Structure, addressof, c_void_p
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from threading import get_ident
from typing import Any, Protocol
from warnings import warn

from gcx.backends.cuda.tables import ELEMENTS, Launch, Walk, make_launches

KERNEL = "gcx_kernel"  # the name of every kernel
OLDEST_DEVICE = (8, 0)  # which converts to bfloat16
_FIRST_LARGE = 12010  # versions of NVRTC and the driver that take more than 4 KB of parameters
_DIGEST = sha256().digest_size

# Device, dtype and walk of an array; None for an array that the kernels do not take.
Traits = tuple[int, str, Walk]
# Kernels, stream, parameters, and the owner of memory that must live until the launch.
Prepared = tuple[Sequence[Any], int, Structure, object]


class _Host(Protocol):
    """NVRTC, the driver and the devices, by the package that comes with the arrays' library.

    An error is an exception with the driver's own name for it. Devices are numbers; all but
    `current` and `capability` are asked with the device current.
    """

    # Of NVRTC and of the driver, such as 12010 for 12.1.
    def versions(self) -> tuple[int, int]: ...
    def compile(self, source: str, options: Sequence[str], /) -> bytes: ...
    def load(self, device: int, code: bytes, /) -> Any: ...
    # The further arguments are those of cuLaunchKernel.
    def launch(self, device: int, kernel: Any, arguments: tuple[int, ...], /) -> None: ...
    def current(self, device: int, /) -> AbstractContextManager[object]: ...
    def capability(self, device: int, /) -> tuple[int, int]: ...
    def stream(self, device: int, /) -> int: ...
    def is_capturing(self) -> bool: ...
    # Return the address of new memory for the current stream, and its owner.
    def allocate(self, device: int, size: int, /) -> tuple[int, object]: ...


class Launcher:
    """Compiles and launches kernels.

    An error is not raised, except for a lack of memory: it is kept in `failures`, under the number
    of its device, and a warning gives the reason. Nothing is launched on this device afterwards, so
    the library's own operations do the work.
    """

    def __init__(self, host: _Host) -> None:
        self.host: _Host = host
        self.failures: dict[int, str] = {}
        self.takes_large: bool = min(host.versions()) >= _FIRST_LARGE
        self._kernels: dict[tuple[object, ...], Any] = {}
        self._is_warned = False  # of a capture

    def prepare(
        self, launch: Launch, addresses: Sequence[Sequence[int]], numbers: Sequence[float]
    ) -> Prepared | None:
        """Do all that takes memory, on the current stream; return None if it is impossible."""
        host, device, size = self.host, launch.device, launch.partials
        if device in self.failures:
            return None
        try:
            launch.loaded = launch.loaded or [self._find(launch, name) for name in launch.kernels]
            partials, owner = host.allocate(device, size) if size else (0, None)
            work = launch.fill(addresses, numbers, partials)
            return launch.loaded, host.stream(device), work, owner
        except Exception as error:  # noqa: BLE001  # whatever a compiler or a driver raises
            self._fail(device, error)
            return None

    def launch(self, launch: Launch, prepared: Prepared | None) -> bool:
        """Launch on the current device; return False if it is impossible."""
        if prepared is None or launch.device in self.failures:
            return False
        kernels, stream, work, _ = prepared
        parameters = c_void_p(addressof(work))
        grid, block = (launch.blocks, 1, 1), (launch.threads, 1, 1)
        arguments = (*grid, *block, 0, stream, addressof(parameters), 0)
        try:
            for kernel in kernels:
                self.host.launch(launch.device, kernel, arguments)
        except Exception as error:  # noqa: BLE001  # whatever a driver raises
            self._fail(launch.device, error)
            return False
        return True

    def _find(self, launch: Launch, name: str) -> Any:
        key = (launch.device, name, launch.rule, launch.dtype, launch.matrices)
        if key not in self._kernels:
            if self.host.is_capturing():
                raise RuntimeError("CAPTURE: a kernel cannot be loaded")
            options = make_options(*key[1:], self.host.capability(launch.device))
            self._kernels[key] = load_kernel(self.host, launch.device, options)
        return self._kernels[key]

    def _fail(self, device: int, error: Exception) -> None:
        """Warn of the reason, and launch nothing on the device from now on."""
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
            raise error
        text = str(error).lower().replace("_", " ")
        if "out of memory" in text:  # by the driver
            raise MemoryError(str(error)) from error
        if "captur" in text:  # of a CUDA graph, in any thread: later calls can succeed
            if not self._is_warned:
                warn(_CAPTURED, RuntimeWarning, stacklevel=3)
            self._is_warned = True
            return
        self.failures[device] = reason = _describe(error)
        warn(_FAILED.format(f" on cuda:{device}", reason), RuntimeWarning, stacklevel=3)


_CAPTURED = (
    "a CUDA graph is captured before the CUDA kernels of gcx have run once, so it gets the array "
    "library's own, slower operations; make one step before the capture"
)
_FAILED = (
    "the CUDA kernels of gcx cannot run{}, so the array library's own, slower operations do their "
    "work: {}"
)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]


def find_launcher(make_host: Callable[[], _Host]) -> Launcher | str:
    """Load the driver; if it is not there, warn of the reason and return it."""
    try:
        return Launcher(make_host())
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever a loader raises
        reason = _describe(error)
        warn(_FAILED.format("", reason), RuntimeWarning, stacklevel=2)
        return reason


class Schedule:
    """Launches of one rule for a list of arrays. Arrays without traits are left out."""

    def __init__(self, launcher: Launcher, rule: str, arrays: Sequence[Traits | None]) -> None:
        self._launcher = launcher
        groups: dict[tuple[int, str], dict[int, Walk]] = {}
        for place, traits in enumerate(arrays):
            if traits is not None:
                groups.setdefault(traits[:2], {})[place] = traits[2]
        self._launches = [
            launch
            for (device, dtype), walks in groups.items()
            for launch in make_launches(device, rule, dtype, walks, large=launcher.takes_large)
        ]
        launched = {place for launch in self._launches for place in launch.places}
        self._left = [k for k in range(len(arrays)) if k not in launched]

    def run(self, addresses: Sequence[Sequence[int]], numbers: Sequence[float]) -> list[int]:
        """Launch on the current streams, given addresses by role; return the positions left out.

        `numbers` are the strength, the rate, and the numbers of the rule: see kernels.cu.
        """
        left = [*self._left]
        launcher = self._launcher
        prepared = []
        # All that takes memory comes before the first launch, so that no step is half done.
        for launch in self._launches:
            with launcher.host.current(launch.device):
                prepared.append(launcher.prepare(launch, addresses, numbers))
        for launch, ready in zip(self._launches, prepared, strict=True):
            with launcher.host.current(launch.device):
                if not launcher.launch(launch, ready):
                    left += launch.places
        return sorted(left)


def make_options(
    kernel: str, rule: str, dtype: str, matrices: int, capability: tuple[int, int]
) -> list[str]:
    """List the options of NVRTC for one kernel. None of them allows less exact arithmetic."""
    constants = {"ELEMENT": ELEMENTS[dtype], "KERNEL": kernel, "RULE": rule, "MATRICES": matrices}
    target = "".join(map(str, capability))
    definitions = [f"-D{name}={value}" for name, value in constants.items()]
    return [f"--gpu-architecture=sm_{target}", "-std=c++17", "--fmad=false", *definitions]


def load_kernel(host: _Host, device: int, options: list[str]) -> Any:
    """Load a kernel from the cache on disk; compile it if it is not there, or does not load."""
    source = files(__package__).joinpath("kernels.cu").read_text(encoding="utf-8")
    text = "\n".join([str(host.versions()[0]), *options, source])
    name = f"{sha256(text.encode()).hexdigest()}.cubin"
    try:
        kept = (_find_cache() / name).read_bytes()
        code = kept[_DIGEST:]
        if sha256(code).digest() == kept[:_DIGEST]:  # a driver may crash on half of a kernel
            return host.load(device, code)
    except (OSError, RuntimeError) as error:  # a RuntimeError: no home, or a failure to load
        if "OUT_OF_MEMORY" in str(error):
            raise
    code = host.compile(source, options)
    with suppress(OSError, RuntimeError):
        _write(_find_cache() / name, sha256(code).digest() + code)
    return host.load(device, code)


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
