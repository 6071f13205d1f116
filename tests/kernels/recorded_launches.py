"""The real launcher on cuda_driver.c, as a program: `recorded_launches.py LIBRARY PACKAGE CHECK`.

Kernels are compiled before the library is loaded, since NVRTC takes it for a real driver.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from struct import unpack_from
from threading import Thread
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from gcx.backends.cuda import drivers
from gcx.backends.cuda.compiler import load_kernel, make_options
from gcx.backends.cuda.launcher import Launcher, Schedule, Traits
from gcx.backends.cuda.tables import count_matrices
from gcx.backends.cuda.walks import Matrix, Walk

from launched import NUMBERS, Variant, work_type
from rules_in_numpy import ROLES

CAPABILITY = (9, 0)
SMALL, LARGE = 4096, 32764  # bytes of parameters
CENTRALIZED = ("rows", "columns", "column_sums", "split_columns")
RULES = {"Store": CENTRALIZED, "AdamW": ("rows", "flat"), "SgdMomentumRate": ("rows", "flat")}
DTYPES = ("float32", "bfloat16", "float64")
# Units and fan-in.
SHAPES = {"rows": [(64, 147), (7, 576)], "columns": [(32, 9), (5, 64)], "flat": [(1, 1000)]}
SPLIT = [(40, 300), (33, 1024)]


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
    """A driver whose calls end in cuda_driver.c; also the host."""

    out_of_memory = MemoryError

    def __init__(self, library: str, package: str) -> None:
        self.driver: Any = {"cuda.bindings": drivers.Bindings, "cupy": drivers.Cupy}[package]()
        self.codes: dict[bytes, Kernel] = {}
        versions, self.driver.versions = self.driver.versions, lambda: (self._nvrtc(), 0)
        for kernel in needed_kernels():
            options = make_options(*kernel, CAPABILITY)
            code = load_kernel(self.driver, options, bytes)
            self.codes[code] = kernel
        self.driver.versions = versions
        self.library = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        self.records = (Record * 1000).in_dll(self.library, "records")
        self.sizes = (ctypes.c_int * 1000).in_dll(self.library, "bytes_of")
        self.kernels: dict[int, Kernel] = {}
        self.device, self.allocated = 0, count(0xA000000, 0x100000)
        load, self.driver.load = self.driver.load, lambda *arguments: self._note(load, *arguments)
        if package == "cupy":  # its runtime wants a real driver
            self.driver._runtime = SimpleNamespace(
                setDevice=self._set_device, driverGetVersion=lambda: self.number("version").value
            )
        self.launcher = Launcher(self.driver, self)

    def _nvrtc(self) -> int:
        nvrtc = self.driver._nvrtc
        ask = getattr(nvrtc, "getVersion", None) or nvrtc.nvrtcVersion
        *_, major, minor = ask()
        return int(1000 * major + 10 * minor)

    def _note(self, load: Any, device: int, code: bytes) -> Any:
        found = load(device, code)
        kernel = self.codes[code]
        self.kernels[int(found)] = kernel
        self.sizes[int(found)] = parameter_bytes(code)
        return found

    def _set_device(self, device: int) -> None:
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
            size = self.sizes[record.kernel]
            kernel = self.kernels[record.kernel]
            found.append(Launch(kernel, *shape, bytes(record.parameters)[:size]))
        number.value = 0
        return found

    # The host

    @contextmanager
    def current(self, device: int) -> Iterator[None]:
        before, self.device = self.device, device
        self._set_device(device)
        yield
        self._set_device(before)
        self.device = before

    def capability(self, device: int) -> tuple[int, int]:
        return CAPABILITY

    def stream(self, device: int) -> int:
        assert device == self.device
        return 0x50 + device

    def is_capturing(self) -> bool:
        return False

    def allocate(self, device: int, size: int) -> tuple[int, object]:
        assert device == self.device
        assert size < 0x100000
        return next(self.allocated), None


def needed_kernels() -> Iterator[Kernel]:
    for rule, kernels in RULES.items():
        for dtype in DTYPES:
            for name in kernels:
                yield Kernel(name, rule, dtype, count_matrices(rule, SMALL))
        yield Kernel("rows", rule, "float32", count_matrices(rule, LARGE))


def parameter_bytes(code: bytes) -> int:
    """Read the size of a kernel's parameters from its cubin, an ELF file."""
    (table,) = unpack_from("<Q", code, 40)
    width, number, names = unpack_from("<3H", code, 58)
    sections = [unpack_from("<IIQQQQ", code, table + k * width) for k in range(number)]
    at = {
        code[sections[names][4] + section[0] :].partition(b"\0")[0]: section for section in sections
    }
    *_, start, size = at[b".nv.info.gcx_kernel"]
    place = start
    while place < start + size:
        kind, name, value = unpack_from("<BBH", code, place)
        if name == 0x19:  # EIATTR_CBANK_PARAM_SIZE
            return int(value)
        place += 4 + (value if kind == 4 else 0)
    raise AssertionError(code)


def traits(
    kind: str, shapes: Sequence[tuple[int, int]], dtype: str, device: int = 0
) -> list[Traits]:
    found = []
    for units, fan_in in shapes:
        step = 0 if kind == "flat" else units if kind == "columns" else fan_in
        found.append((device, dtype, Walk(kind, (Matrix(0, units, fan_in, step),))))
    return found


def addresses_of(rule: str, arrays: int, start: int) -> list[list[int]]:
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
    most: int,
    partials: int = 0,
) -> list[Launch]:
    """Write down the launches of arrays that fit in one, by another description of Work."""
    device, dtype, _ = arrays[0]
    variant = Variant("split columns" if len(names) > 1 else names[0], rule, dtype)
    work = work_type(variant, most)()
    blocks = 0
    for m, (_, _, walk) in enumerate(arrays):
        _, units, fan_in, step = walk.matrices[0]
        number, shares = variant.cut(units, fan_in)
        work.matrix[m][:] = units, fan_in, step, shares
        for role, of_role in enumerate(addresses):
            work.arrays[role][m] = of_role[m]
        work.first_tile[m] = blocks
        blocks += number
    work.numbers[: len(NUMBERS[rule])] = NUMBERS[rule]
    work.partials, work.matrices = partials, len(arrays)
    shape = (blocks, variant.threads, 0x50 + device, 0x100 + device)
    kernels = [Kernel(name, rule, dtype, most) for name in names]
    parameters = bytes(work) + bytes(-len(bytes(work)) % 16)  # its records are aligned
    return [Launch(kernel, *shape, parameters) for kernel in kernels]


# Checks


def rules(recorded: Recorded) -> None:
    """Every rule and dtype, by each kind of kernel, twice at other addresses."""
    for rule, kernels in RULES.items():
        most = count_matrices(rule, SMALL)
        for dtype in DTYPES:
            for kind in [name for name in kernels if name in SHAPES]:
                arrays = traits(kind, SHAPES[kind], dtype)
                schedule = Schedule(recorded.launcher, rule, arrays)
                for start in (0x7F0000000000, 0x7E0000000010):
                    addresses = addresses_of(rule, len(arrays), start)
                    assert schedule.run(addresses, NUMBERS[rule]) == []
                    found = recorded.take()
                    assert found == expected([kind], rule, arrays, addresses, most=most)
                    assert len(found[0].parameters) <= SMALL


def split_columns(recorded: Recorded) -> None:
    """Two kernels share new memory for their sums."""
    most = count_matrices("Store", SMALL)
    for dtype in DTYPES:
        arrays = traits("columns", SPLIT, dtype)
        schedule = Schedule(recorded.launcher, "Store", arrays)
        for _ in range(2):
            addresses = addresses_of("Store", 2, 0x7F0000000000)
            partials = next(recorded.allocated)
            recorded.allocated = count(partials, 0x100000)
            assert schedule.run(addresses, NUMBERS["Store"]) == []
            names = ["column_sums", "split_columns"]
            assert recorded.take() == expected(
                names, "Store", arrays, addresses, most=most, partials=partials
            )


def sizes(recorded: Recorded) -> None:
    """32 KB of parameters in one launch, or 4 KB in each of several on older drivers."""
    for rule in RULES:
        small, large = (count_matrices(rule, size) for size in (SMALL, LARGE))
        arrays = traits("rows", [(5, 12)] * large, "float32")
        addresses = addresses_of(rule, large, 0x7F0000000000)
        assert Schedule(recorded.launcher, rule, arrays).run(addresses, NUMBERS[rule]) == []
        (found,) = recorded.take()
        assert [found] == expected(["rows"], rule, arrays, addresses, most=large)
        assert SMALL < len(found.parameters) <= LARGE
        recorded.number("version").value = 12000
        older = Launcher(recorded.driver, recorded)
        recorded.number("version").value = 13000
        assert Schedule(older, rule, arrays).run(addresses, NUMBERS[rule]) == []
        several = recorded.take()
        assert len(several) == -(-large // small)
        for k, each in enumerate(several):
            part = slice(k * small, (k + 1) * small)
            at = [of_role[part] for of_role in addresses]
            assert [each] == expected(["rows"], rule, arrays[part], at, most=small)
            assert len(each.parameters) <= SMALL


def devices(recorded: Recorded) -> None:
    """Each device gets its arrays, on its own stream and in its own context."""
    both = [traits("rows", SHAPES["rows"], "float32", device) for device in (0, 1)]
    arrays = [both[0][0], both[1][0], both[1][1], both[0][1]]
    addresses = addresses_of("Store", 4, 0x7F0000000000)
    assert Schedule(recorded.launcher, "Store", arrays).run(addresses, NUMBERS["Store"]) == []
    most = count_matrices("Store", SMALL)
    wanted = []
    for places in ([0, 3], [1, 2]):
        at = [[of_role[k] for k in places] for of_role in addresses]
        wanted += expected(["rows"], "Store", [arrays[k] for k in places], at, most=most)
    assert recorded.take() == wanted


def threads(recorded: Recorded) -> None:
    """Each thread without a context gets its device's context once."""
    arrays = traits("rows", SHAPES["rows"], "float32", 1)
    schedule = Schedule(recorded.launcher, "Store", arrays)
    addresses = addresses_of("Store", 2, 0x7F0000000000)
    errors: list[str] = []

    def run() -> None:
        recorded.current = nullcontext  # type: ignore[method-assign,assignment]
        recorded.device = 1
        with warnings.catch_warnings(record=True) as told:
            for _ in range(3):
                schedule.run(addresses, NUMBERS["Store"])
        errors.extend(str(warning.message) for warning in told)

    for _ in range(2):
        thread = Thread(target=run)
        thread.start()
        thread.join()
    assert not errors, errors
    most = count_matrices("Store", SMALL)
    assert recorded.take() == expected(["rows"], "Store", arrays, addresses, most=most) * 6
    assert recorded.number("retained").value in (0, 2)  # CuPy has set the device itself


def errors(recorded: Recorded) -> None:
    """An error is kept with its name; a lack of memory is raised, and the next launch goes on."""
    arrays = traits("rows", SHAPES["rows"], "float32")
    schedule = Schedule(recorded.launcher, "Store", arrays)
    addresses = addresses_of("Store", 2, 0x7F0000000000)
    for function in ("error_of_load", "error_of_launch"):
        recorded.number(function).value = 2
        with pytest.raises(MemoryError, match="CUDA_ERROR_OUT_OF_MEMORY"):
            schedule.run(addresses, NUMBERS["Store"])
        recorded.number(function).value = 0
        assert schedule.run(addresses, NUMBERS["Store"]) == []
    recorded.take()
    recorded.number("error_of_launch").value = 700
    with warnings.catch_warnings(record=True) as told:
        for _ in range(2):
            assert schedule.run(addresses, NUMBERS["Store"]) == [0, 1]
    (warning,) = told
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in str(warning.message)
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in recorded.launcher.failures[0]
    assert recorded.take() == []


CHECKS = (rules, split_columns, sizes, devices, threads, errors)

if __name__ == "__main__":
    path, package, name = sys.argv[1:]
    (check,) = (each for each in CHECKS if each.__name__ == name)
    check(Recorded(path, package))
