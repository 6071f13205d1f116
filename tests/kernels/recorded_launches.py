"""The real launcher on cuda_driver.c: `recorded_launches.py LIBRARY PACKAGE CHECK [FAULT]`.

Kernels are compiled before the library is loaded, since NVRTC takes it for a real driver.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from itertools import count
from threading import Thread
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from gcx.backends.cuda.launcher import Launcher, Schedule, Traits, load_kernel, make_options
from gcx.backends.cuda.tables import Matrix, Walk, count_matrices

from launched import NUMBERS, Variant, make_work, work_type
from rules_in_numpy import ROLES

DRIVERS = {"cuda.bindings": "gcx.backends._torch_driver", "cupy": "gcx.backends._cupy"}
CAPABILITY = (9, 0)
SMALL, LARGE = 4096, 32764  # bytes of parameters
CENTRALIZED = ("rows", "columns", "column_sums", "split_columns")
RULES = {"Store": CENTRALIZED, "AdamW": ("rows", "flat"), "SgdMomentumRate": ("rows", "flat")}
DTYPES = ("float32", "bfloat16", "float64")
# Units and fan-in.
SHAPES = {"rows": [(64, 147), (7, 576)], "columns": [(32, 9), (5, 64)], "flat": [(1, 1000)]}
SPLIT = [(40, 300), (33, 1024)]
ADDRESS = 0x7F0000000000


class Record(ctypes.Structure):
    """A launch, as cuda_driver.c keeps it."""

    _fields_ = (
        ("kernel", ctypes.c_ulonglong),
        ("grid", ctypes.c_ulonglong * 3),
        ("block", ctypes.c_ulonglong * 3),
        ("shared", ctypes.c_ulonglong),
        ("stream", ctypes.c_ulonglong),
        ("context", ctypes.c_ulonglong),
        ("extra", ctypes.c_ulonglong),
        ("parameters", ctypes.c_ubyte * 32768),
    )


class Kernel(NamedTuple):
    """A compiled kernel, and the number of matrices that its parameters hold."""

    name: str
    rule: str
    dtype: str
    matrices: int


class Launch(NamedTuple):
    """All that a driver is told."""

    kernel: Kernel
    blocks: int
    threads: int
    stream: int
    context: int
    parameters: bytes


class Recorded:
    """Mixin for a driver: its calls end in cuda_driver.c, and its devices are not there."""

    is_capturing = staticmethod(lambda: False)
    library: Any = None

    def __init__(self, library: str) -> None:
        super().__init__()
        self.device, self.allocated = 0, count(0xA000000, 0x100000)
        codes = {load_kernel(self, 0, make_options(*k, CAPABILITY)): k for k in needed_kernels()}
        self.codes: dict[bytes, Kernel] = codes
        self.kernels: dict[int, Kernel] = {}
        self.library = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        self.records = (Record * 1000).in_dll(self.library, "records")
        self.sizes = (ctypes.c_int * 1000).in_dll(self.library, "bytes_of")
        if hasattr(self, "_runtime"):  # CuPy's wants a real driver
            driver_version = lambda: self.number("version").value  # noqa: E731
            self._runtime = SimpleNamespace(
                setDevice=self.set_device, driverGetVersion=driver_version
            )

    def versions(self) -> Any:
        if self.library is not None:
            return super().versions()  # type: ignore[misc]
        ask = getattr(self._nvrtc, "getVersion", None) or self._nvrtc.nvrtcVersion
        *_, major, minor = ask()
        return 1000 * major + 10 * minor, 0

    def compile(self, source: str, options: Sequence[str], /) -> Any:
        assert self.library is None
        return super().compile(source, options)  # type: ignore[misc]

    def load(self, device: int, code: bytes) -> Any:
        if self.library is None:
            return code
        found = super().load(device, code)  # type: ignore[misc]
        kernel = self.kernels[int(found)] = self.codes[code]
        variant = Variant(kernel.name, kernel.rule, kernel.dtype)
        self.sizes[int(found)] = len(bytes_of(work_type(variant, kernel.matrices)()))
        return found

    def set_device(self, device: int) -> None:
        self.library.cuCtxSetCurrent(ctypes.c_void_p(0x100 + device))

    def number(self, name: str) -> Any:
        return ctypes.c_int.in_dll(self.library, name)

    def take(self) -> list[Launch]:
        """Return the launches since the last call."""
        number = self.number("count")
        found = []
        for record in self.records[: number.value]:
            assert list(record.grid[1:]) == list(record.block[1:]) == [1, 1]
            assert record.shared == record.extra == 0
            shape = (record.grid[0], record.block[0], record.stream, record.context)
            parameters = bytes(record.parameters)[: self.sizes[record.kernel]]
            found.append(Launch(self.kernels[record.kernel], *shape, parameters))
        number.value = 0
        return found

    @contextmanager
    def current(self, device: int) -> Iterator[None]:
        before, self.device = self.device, device
        self.set_device(device)
        yield
        self.set_device(before)
        self.device = before

    def capability(self, _: int) -> tuple[int, int]:
        return CAPABILITY

    def stream(self, device: int) -> int:
        assert device == self.device
        return 0x50 + device

    def allocate(self, device: int, size: int) -> tuple[int, object]:
        assert device == self.device
        assert size < 0x100000
        return next(self.allocated), None


class Faulty(Recorded):
    """Another launch reaches the driver than the launcher has made, or none."""

    fault = ""

    def launch(self, device: int, kernel: Any, arguments: tuple[int, ...], /) -> None:
        place, value = ARGUMENTS.get(self.fault, (0, arguments[0]))
        if self.fault == "address":  # one byte of the first
            before = 16 * self.kernels[int(kernel)].matrices
            work = ctypes.c_size_t.from_address(arguments[8]).value
            ctypes.c_ubyte.from_address(work + before).value ^= 1
        if self.fault == "context":
            self.set_device(device := 1 - device)
        with suppress(*([RuntimeError] if self.fault == "status" else [])):
            changed = (*arguments[:place], value, *arguments[place + 1 :])
            super().launch(device, kernel, changed)  # type: ignore[misc]


def needed_kernels() -> Iterator[Kernel]:
    for rule, kernels in RULES.items():
        for dtype in DTYPES:
            for name in kernels:
                yield Kernel(name, rule, dtype, count_matrices(rule, dtype, SMALL))
        yield Kernel("rows", rule, "float32", count_matrices(rule, "float32", LARGE))


def bytes_of(work: Any) -> bytes:
    return bytes(work) + bytes(-len(bytes(work)) % 16)  # its records are aligned


def traits(
    kind: str, shapes: Sequence[tuple[int, int]], dtype: str, device: int = 0
) -> list[Traits]:
    steps = {"flat": lambda units, fan_in: 0, "columns": lambda units, fan_in: units}
    find_step: Callable[[int, int], int] = steps.get(kind, lambda units, fan_in: fan_in)
    matrices = [Matrix(0, *shape, find_step(*shape)) for shape in shapes]
    return [(device, dtype, Walk(kind, (matrix,))) for matrix in matrices]


def addresses_of(rule: str, arrays: int, start: int = ADDRESS) -> list[list[int]]:
    return [
        [start + (role << 32) + (k << 16) + 4 * k for k in range(arrays)]
        for role in range(len(ROLES[rule]))
    ]


def expected(
    names: Sequence[str],
    rule: str,
    arrays: Sequence[Traits],
    addresses: Sequence[Sequence[int]],
    *,
    size: int = SMALL,
    partials: int = 0,
) -> list[Launch]:
    """Write down the launches of arrays that fit in one, by another description of Work."""
    device, dtype, _ = arrays[0]
    variant = Variant("split columns" if len(names) > 1 else names[0], rule, dtype)
    most = count_matrices(rule, dtype, size)
    shapes = [walk.matrices[0][1:] for *_, walk in arrays]
    work, blocks = make_work(variant, most, shapes, addresses, NUMBERS[rule])
    work.partials = partials
    shape = (blocks, variant.threads, 0x50 + device, 0x100 + device, bytes_of(work))
    return [Launch(Kernel(name, rule, dtype, most), *shape) for name in names]


# Checks


def rules(recorded: Any) -> None:
    """Every rule and dtype, by each kind of kernel, twice at other addresses."""
    for rule, kernels in RULES.items():
        for dtype in DTYPES:
            for kind in [name for name in kernels if name in SHAPES]:
                arrays = traits(kind, SHAPES[kind], dtype)
                schedule = Schedule(Launcher(recorded), rule, arrays)
                for start in (ADDRESS, 0x7E0000000010):
                    addresses = addresses_of(rule, len(arrays), start)
                    assert schedule.run(addresses, NUMBERS[rule]) == []
                    found = recorded.take()
                    assert found == expected([kind], rule, arrays, addresses)
                    assert len(found[0].parameters) <= SMALL


def split_columns(recorded: Any) -> None:
    """Two kernels share new memory for their sums."""
    addresses = addresses_of("Store", 2)
    for dtype in DTYPES:
        arrays = traits("columns", SPLIT, dtype)
        schedule = Schedule(Launcher(recorded), "Store", arrays)
        for start in (0xB000000, 0xC000000):
            recorded.allocated = count(start, 0x100000)
            assert schedule.run(addresses, NUMBERS["Store"]) == []
            names = ["column_sums", "split_columns"]
            wanted = expected(names, "Store", arrays, addresses, partials=start)
            assert recorded.take() == wanted


def sizes(recorded: Any) -> None:
    """32 KB of parameters in one launch, or 4 KB in each of several on older drivers."""
    counts = {count_matrices(rule, dtype, SMALL) for rule in RULES for dtype in DTYPES}
    assert (min(counts), max(counts)) == (77, 112)
    for rule in RULES:
        small, large = (count_matrices(rule, "float32", size) for size in (SMALL, LARGE))
        arrays, addresses = traits("rows", [(5, 12)] * large, "float32"), addresses_of(rule, large)
        assert Schedule(Launcher(recorded), rule, arrays).run(addresses, NUMBERS[rule]) == []
        (found,) = recorded.take()
        assert [found] == expected(["rows"], rule, arrays, addresses, size=LARGE)
        assert SMALL < len(found.parameters) <= LARGE
        recorded.number("version").value = 12000
        older = Launcher(recorded)
        recorded.number("version").value = 13000
        assert Schedule(older, rule, arrays).run(addresses, NUMBERS[rule]) == []
        several = recorded.take()
        assert len(several) == -(-large // small)
        for k, each in enumerate(several):
            part = slice(k * small, (k + 1) * small)
            at = [of_role[part] for of_role in addresses]
            assert [each] == expected(["rows"], rule, arrays[part], at)
            assert len(each.parameters) <= SMALL


def devices(recorded: Any) -> None:
    """Each device gets its arrays, on its own stream and in its own context."""
    both = [traits("rows", SHAPES["rows"], "float32", device) for device in (0, 1)]
    arrays = [both[0][0], both[1][0], both[1][1], both[0][1]]
    addresses = addresses_of("Store", 4)
    assert Schedule(Launcher(recorded), "Store", arrays).run(addresses, NUMBERS["Store"]) == []
    wanted = []
    for places in ([0, 3], [1, 2]):
        at = [[of_role[k] for k in places] for of_role in addresses]
        wanted += expected(["rows"], "Store", [arrays[k] for k in places], at)
    assert recorded.take() == wanted


def threads(recorded: Any) -> None:
    """Each thread without a context gets its device's context once."""
    arrays, addresses = traits("rows", SHAPES["rows"], "float32", 1), addresses_of("Store", 2)
    schedule = Schedule(Launcher(recorded), "Store", arrays)
    recorded.current, recorded.device = nullcontext, 1
    errors: list[object] = []

    def run() -> None:
        with warnings.catch_warnings(record=True) as told:
            for _ in range(3):
                schedule.run(addresses, NUMBERS["Store"])
        errors.extend(warning.message for warning in told)

    for _ in range(2):
        thread = Thread(target=run)
        thread.start()
        thread.join()
    assert not errors, errors
    assert recorded.take() == expected(["rows"], "Store", arrays, addresses) * 6
    assert recorded.number("retained").value in (0, 2)  # CuPy has set the device itself


def errors(recorded: Any) -> None:
    """An error is kept with its name; a lack of memory is raised, and the next launch goes on."""
    arrays, addresses = traits("rows", SHAPES["rows"], "float32"), addresses_of("Store", 2)
    launcher = Launcher(recorded)
    schedule = Schedule(launcher, "Store", arrays)
    for function in ("error_of_load", "error_of_launch"):
        recorded.number(function).value = 2
        with pytest.raises(MemoryError, match="CUDA_ERROR_OUT_OF_MEMORY"):
            schedule.run(addresses, NUMBERS["Store"])
        recorded.number(function).value = 0
        assert schedule.run(addresses, NUMBERS["Store"]) == []
    recorded.take()
    recorded.number("error_of_launch").value = 700
    with pytest.warns(RuntimeWarning, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        assert schedule.run(addresses, NUMBERS["Store"]) == [0, 1]
    assert schedule.run(addresses, NUMBERS["Store"]) == [0, 1]  # a warning is an error
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in launcher.failures[0]
    assert recorded.take() == []


CHECKS = (rules, split_columns, sizes, devices, threads, errors)
# Each finds a fault. Some are other arguments of cuLaunchKernel: their places and values.
FAULTS = ("address", "block", "grid", "stream", "context", "status")
ARGUMENTS = {"block": (3, 32), "grid": (0, 1), "stream": (7, 0)}

if __name__ == "__main__":
    path, package, name, *fault = sys.argv[1:]
    driver = import_module(DRIVERS[package]).Driver
    (check,) = (each for each in CHECKS if each.__name__ == name)
    warnings.simplefilter("error")
    check(type("Host", (Faulty if fault else Recorded, driver), {"fault": "".join(fault)})(path))
