"""Launches of the CUDA kernels, for lists of arrays whose shapes and strides are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from ctypes import addressof, c_char, c_void_p
from typing import Any, Protocol
from warnings import warn

from gcx.backends.cuda.compiler import load_kernel, make_options
from gcx.backends.cuda.drivers import Driver
from gcx.backends.cuda.tables import Launch, make_launches
from gcx.backends.cuda.walks import Walk

OLDEST_DEVICE = (8, 0)  # which converts to bfloat16
_FIRST_LARGE = 12010  # versions of NVRTC and the driver that take more than 4 KB of parameters

# Device, dtype and walk of an array; None for an array that the kernels do not take.
Traits = tuple[int, str, Walk]
# Kernels, stream, parameters, and the owner of memory that must live until the launch.
Prepared = tuple[Sequence[Any], int, bytearray, object]


class Host(Protocol):
    """The arrays' library, asked about its devices."""

    @property
    def out_of_memory(self) -> type[Exception]:
        """The library's error for a lack of memory."""

    def current(self, device: int, /) -> AbstractContextManager[object]:
        """Make a device current."""

    def capability(self, device: int, /) -> tuple[int, int]:
        """Return the compute capability of a device, such as (9, 0)."""

    def stream(self, device: int, /) -> int:
        """Return the handle of the current stream."""

    def is_capturing(self) -> bool:
        """Return True if a CUDA graph is captured on the current stream."""

    def allocate(self, device: int, size: int, /) -> tuple[int, object]:
        """Return the address of new memory for the current stream, and its owner."""


class Launcher:
    """Compiles and launches kernels.

    An error is not raised, except for a lack of memory: it is kept in `failures`, under the number
    of its device, and a warning gives the reason. Nothing is launched on this device afterwards, so
    the library's own operations do the work.
    """

    def __init__(self, driver: Driver, host: Host) -> None:
        self._driver = driver
        self.host: Host = host
        self._kernels: dict[tuple[object, ...], Any] = {}
        self.failures: dict[int, str] = {}
        self._is_warned = False  # of a capture
        self.takes_large: bool = min(driver.versions()) >= _FIRST_LARGE

    def find(self, device: int, launch: Launch, name: str) -> Any:
        """Find a kernel for a launch; compile it if necessary. None while a graph is captured."""
        key = (device, name, launch.rule, launch.dtype, launch.matrices)
        found = self._kernels.get(key)
        if found is None and not self.host.is_capturing():  # a capture allows no loading
            target = self.host.capability(device)
            options = make_options(name, launch.rule, launch.dtype, launch.matrices, target)
            found = load_kernel(self._driver, options, lambda code: self._driver.load(device, code))
            self._kernels[key] = found
        return found

    def prepare(
        self,
        device: int,
        launch: Launch,
        addresses: Sequence[Sequence[int]],
        numbers: Sequence[float],
    ) -> Prepared | None:
        """Do all that takes memory, on the current stream; return None if it is impossible."""
        host = self.host
        if device in self.failures:
            return None
        try:
            kernels = launch.loaded or [self.find(device, launch, k) for k in launch.kernels]
            if None not in kernels:
                launch.loaded = kernels
                size = launch.partials
                partials, owner = host.allocate(device, size) if size else (0, None)
                work = launch.fill(addresses, numbers, partials)
                return kernels, host.stream(device), work, owner
        except Exception as error:  # noqa: BLE001  # whatever a compiler or a driver raises
            self._fail(device, error)
            return None
        self._warn_of_capture()
        return None

    def _warn_of_capture(self) -> None:
        if not self._is_warned:
            self._is_warned = True
            msg = (
                "a CUDA graph is captured before the CUDA kernels of gcx have run once, so it gets "
                "the array library's own, slower operations; make one step before the capture"
            )
            warn(msg, RuntimeWarning, stacklevel=3)

    def launch(self, device: int, launch: Launch, prepared: Prepared | None) -> bool:
        """Launch on the current device; return False if it is impossible."""
        if prepared is None or device in self.failures:
            return False
        kernels, stream, work, _ = prepared
        parameters = c_void_p(addressof(c_char.from_buffer(work)))
        grid, block = (launch.blocks, 1, 1), (launch.threads, 1, 1)
        arguments = (*grid, *block, 0, stream, addressof(parameters), 0)
        try:
            for kernel in kernels:
                self._driver.launch(device, kernel, arguments)
        except Exception as error:  # noqa: BLE001  # whatever a driver raises
            self._fail(device, error)
            return False
        return True

    def _fail(self, device: int, error: Exception) -> None:
        """Launch nothing on a device from now on, and warn of the reason."""
        if isinstance(error, (MemoryError, self.host.out_of_memory)):
            raise error
        if "OUT_OF_MEMORY" in str(error):  # by the driver
            raise MemoryError(str(error)) from error
        if "CAPTURE" in str(error):  # of a CUDA graph, in any thread: later calls can succeed
            self._warn_of_capture()
            return
        self.failures[device] = reason = _describe(error)
        warn(_FAILED.format(f" on cuda:{device}", reason), RuntimeWarning, stacklevel=3)


def find_launcher(make_driver: Callable[[], Driver], host: Host) -> Launcher | str:
    """Load the driver; if it is not there, warn of the reason and return it."""
    try:
        return Launcher(make_driver(), host)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever a loader raises
        reason = _describe(error)
        warn(_FAILED.format("", reason), RuntimeWarning, stacklevel=2)
        return reason


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]


_FAILED = (
    "the CUDA kernels of gcx cannot run{}, so the array library's own, slower operations do their "
    "work: {}"
)


class Schedule:
    """Launches of one rule for a list of arrays. Arrays without traits are left out."""

    def __init__(self, launcher: Launcher, rule: str, arrays: Sequence[Traits | None]) -> None:
        self._launcher = launcher
        groups: dict[tuple[int, str], dict[int, Walk]] = {}
        for place, traits in enumerate(arrays):
            if traits is not None:
                groups.setdefault(traits[:2], {})[place] = traits[2]
        self._launches = [
            (device, make_launches(rule, dtype, walks, large=launcher.takes_large))
            for (device, dtype), walks in groups.items()
        ]
        launched = {k for _, launches in self._launches for each in launches for k in each.places}
        self._left = [k for k in range(len(arrays)) if k not in launched]

    def run(self, addresses: Sequence[Sequence[int]], numbers: Sequence[float]) -> list[int]:
        """Launch on the current streams, given addresses by role; return the positions left out.

        `numbers` are the strength, the rate, and the numbers of the rule: see kernels.cu.
        """
        left = [*self._left]
        launcher = self._launcher
        prepared = []
        # All that takes memory comes before the first launch, so that no step is half done.
        for device, launches in self._launches:
            with launcher.host.current(device):
                for launch in launches:
                    ready = launcher.prepare(device, launch, addresses, numbers)
                    prepared.append((device, launch, ready))
        for device, launch, ready in prepared:
            with launcher.host.current(device):
                if not launcher.launch(device, launch, ready):
                    left += launch.places
        return sorted(left)
