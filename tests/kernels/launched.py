"""Launches of kernels.cu on matrices, with a look at all memory around them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gcx.backends.cuda.launcher import make_options

import rules_in_numpy
from emulated_cuda import EmulatedDriver
from rules_in_numpy import ROLES
from same_bits import assert_same_bits

KERNELS = ("rows", "long_rows", "columns", "split columns", "flat")  # split: of two launches
SEGMENT = 16384

SOURCE = files("gcx").joinpath("backends/cuda/kernels.cu").read_text()

# Strength, rate, and the numbers of a rule; the second of SGD is for later steps.
NUMBERS = {
    "Store": (0.7, 0.0),
    "StoreRate": (0.7, 1e-2),
    "AdamW": (1.0, 0.0, -1.0, 1e-4, 0.9, 0.999, 1e-3 / 0.19, 0.0447, 1e-8),
    **dict.fromkeys(("Sgd", "SgdRate"), (0.7, 1e-2, -1.0, -0.1, 0.0, 0.0, 0.0, 0.0)),
    **dict.fromkeys(("SgdMomentum", "SgdMomentumRate"), (1.0, 1e-2, 1.0, -0.1, 0.9, 0.8, 0.0, 1.0)),
}


class Matrix(NamedTuple):
    """A matrix in memory, with `pad` elements between its lines; `shift` misaligns its start."""

    units: int
    fan_in: int
    pad: int = 0
    shift: int = 0


class Variant(NamedTuple):
    """A kernel with a rule, for a dtype."""

    kernel: str
    rule: str
    dtype: str

    @property
    def pack(self) -> int:
        """Number of elements in 16 bytes."""
        return 8 if "16" in self.dtype else 4 if self.dtype == "float32" else 2

    @property
    def wide(self) -> Any:
        """The dtype of sums."""
        return np.float64 if self.dtype == "float64" else np.float32

    @property
    def threads(self) -> int:
        """Number of threads in a block."""
        return SEGMENT // 8 // self.pack if self.kernel == "long_rows" else 256

    def options(self, matrices: int = 64, architecture: int = 90) -> list[str]:
        """List the options of the compiler."""
        return make_options(*self, matrices, divmod(architecture, 10))

    def cut(self, units: int, fan_in: int) -> tuple[int, int]:
        """Count the tiles of a matrix, and its `shares`."""
        if self.kernel == "rows":
            shares = max(2, _power_of_two(-(-fan_in // (8 * self.pack))))
            return -(-units * shares // 256), shares
        if self.kernel == "long_rows":
            return units, 1
        if self.kernel == "flat":
            return -(-fan_in // (256 * 4 * self.pack)), 1
        splits = _power_of_two(-(-min(fan_in, SEGMENT) // (32 * (4 if self.pack > 4 else 8))))
        return -(-units // (8 * self.pack)) * -(-fan_in // SEGMENT) * splits, splits


def work_type(variant: Variant, matrices: int) -> type[ctypes.Structure]:
    """Make the structure Work of kernels.cu."""
    is_double = variant.dtype == "float64" or variant.rule.startswith("Sgd")
    number = ctypes.c_double if is_double else ctypes.c_float
    fields = [
        ("matrix", ctypes.c_int * 4 * matrices),
        ("arrays", ctypes.c_void_p * matrices * len(ROLES[variant.rule])),
        ("first_tile", ctypes.c_int * matrices),
        ("numbers", number * 9),
        ("partials", ctypes.c_void_p),
        ("matrices", ctypes.c_int),
    ]
    return type("Work", (ctypes.Structure,), {"_fields_": fields})


def make_work(
    variant: Variant,
    most: int,
    matrices: Sequence[tuple[int, int, int]],
    addresses: Sequence[Sequence[int]],
    numbers: Sequence[float],
) -> tuple[Any, int]:
    """Fill the structure for matrices of units, fan-in and step; count the blocks too."""
    work = work_type(variant, most)()
    blocks = 0
    for m, (units, fan_in, step) in enumerate(matrices):
        count, shares = variant.cut(units, fan_in)
        work.matrix[m][:] = units, fan_in, step, shares
        for role, of_role in enumerate(addresses):
            work.arrays[role][m] = of_role[m]
        work.first_tile[m] = blocks
        blocks += count
    work.numbers[: len(numbers)] = numbers
    work.matrices = len(matrices)
    return work, blocks


def check(
    drivers: Sequence[EmulatedDriver],
    variant: Variant,
    matrices: Sequence[Matrix],
    *,
    numbers: tuple[float, ...] | None = None,
    fill: Any = None,
    source: str = SOURCE,
    margin: int = 40,
) -> None:
    """Launch a kernel by each driver, and compare all memory around the matrices, bit by bit."""
    kernel, rule, dtype = variant
    fill = fill or random_numbers
    numbers = numbers or NUMBERS[rule]
    random = np.random.default_rng(0)
    lists = []
    for matrix in matrices:
        arrays = {role: Array(matrix, role, variant, margin) for role in ROLES[rule]}
        for role, array in arrays.items():
            array.old[...] = fill(random, array.old.size, dtype, role)
            array.wanted[...] = array.old
        with np.errstate(all="ignore"):
            before = {role: x.view(x.old).astype(variant.wide) for role, x in arrays.items()}
            result = rules_in_numpy.apply(rule, before, numbers, centralized=kernel != "flat")
            for role, values in result.items():
                arrays[role].view(arrays[role].wanted)[...] = values
        lists.append(arrays)
    every = [array for arrays in lists for array in arrays.values()]
    for driver in drivers:
        for array in every:
            array.whole[...] = array.old
        _launch(driver, source, variant, matrices, lists, numbers)
        for array in every:
            assert_same_bits(array.whole, array.wanted)


class Array:
    """Memory of a matrix, whose first element is `shift` elements behind a multiple of 16 bytes."""

    def __init__(self, matrix: Matrix, role: str, variant: Variant, margin: int) -> None:
        self._units, self._fan_in, self._pad, shift = matrix
        self._is_columns = "columns" in variant.kernel
        self._start = margin + shift * (2 if role in {"out", "weight"} else 1)
        line, lines = self._units, self._fan_in
        if not self._is_columns:
            line, lines = lines, line
        self.step = line + self._pad
        size = self._start + lines * self.step - self._pad + margin
        kind = np.dtype(getattr(ml_dtypes, variant.dtype, variant.dtype))
        whole = np.empty(size + variant.pack, kind)
        start = -(whole.ctypes.data // kind.itemsize + margin) % variant.pack
        # Without a margin, memory ends behind the last element: a sanitizer watches it.
        self.whole = whole[start : start + size]
        self.old, self.wanted = np.empty_like(self.whole), np.empty_like(self.whole)
        self.address = self.whole.ctypes.data + self._start * kind.itemsize

    def view(self, whole: Any) -> Any:
        """See the matrix in a copy of its memory, with units first."""
        width = whole.itemsize
        strides = (width, width * self.step) if self._is_columns else (width * self.step, width)
        shape = (self._units, self._fan_in)
        return np.lib.stride_tricks.as_strided(whole[self._start :], shape, strides)


def _launch(
    driver: EmulatedDriver, source: str, variant: Variant, matrices: Sequence[Matrix], *given: Any
) -> None:
    lists, numbers = given
    most = len(matrices) + 3
    shapes = [(m.units, m.fan_in, x["grad"].step) for m, x in zip(matrices, lists, strict=True)]
    addresses = [[arrays[role].address for arrays in lists] for role in ROLES[variant.rule]]
    work, blocks = make_work(variant, most, shapes, addresses, numbers)
    partials = np.full(blocks * 8 * variant.pack, np.nan, variant.wide)
    work.partials = partials.ctypes.data
    parameters = ctypes.c_void_p(ctypes.addressof(work))
    size = (blocks, 1, 1, variant.threads, 1, 1)
    is_split = variant.kernel == "split columns"
    for name in ("column_sums", "split_columns") if is_split else (variant.kernel,):
        code = driver.compile(source, variant._replace(kernel=name).options(most))
        function = driver.load(0, code)
        driver.launch(0, function, (*size, 0, 0, ctypes.addressof(parameters), 0))


def random_numbers(random: Any, size: int, dtype: str, role: str) -> Any:
    """Draw numbers of many magnitudes, with zeros of both signs and subnormal numbers."""
    x = random.standard_normal(size) * 10.0 ** random.integers(-4, 3, size) + 0.1
    kind = random.random(size)
    x[kind < 0.04] = 0.0
    x[kind < 0.02] = -0.0
    smallest = {"float16": 6e-8, "float64": 5e-324}.get(dtype, 1e-41)
    x[kind > 0.97] = smallest * random.integers(1, 9)
    return np.abs(x) if role == "exp_avg_sq" else x


def negative_zeros(random: Any, size: int, dtype: str, role: str) -> Any:
    return np.full(size, -0.0)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
