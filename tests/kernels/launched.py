"""One launch of kernels.cu on matrices in memory that is watched: tables, parameters and arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import rules_in_numpy
from emulated_cuda import EmulatedDriver
from rules_in_numpy import ROLES
from same_bits import assert_same_bits

ELEMENTS = {"float16": "Half", "bfloat16": "BFloat16", "float32": "float", "float64": "double"}
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


def options(
    kernel: str, rule: str, dtype: str, matrices: int = 64, architecture: int = 90
) -> list[str]:
    """List the options of the compiler."""
    constants = {"ELEMENT": ELEMENTS[dtype], "KERNEL": kernel, "RULE": rule, "MATRICES": matrices}
    definitions = [f"-D{name}={value}" for name, value in constants.items()]
    return [f"--gpu-architecture=sm_{architecture}", "-std=c++17", "--fmad=false", *definitions]


def itemsize(dtype: str) -> int:
    return {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[dtype]


def tiles(kernel: str, units: int, fan_in: int, pack: int) -> tuple[int, int]:
    """Count the tiles of a matrix, and its `shares`."""
    if kernel == "rows":
        shares = max(2, _power_of_two(-(-fan_in // (8 * pack))))
        return -(-units * shares // 256), shares
    if kernel == "long_rows":
        return units, 1
    if kernel == "flat":
        return -(-fan_in // (256 * 4 * pack)), 1
    splits = _power_of_two(-(-min(fan_in, SEGMENT) // (32 * (4 if pack > 4 else 8))))
    return -(-units // (8 * pack)) * -(-fan_in // SEGMENT) * splits, splits


def threads_of(kernel: str, pack: int) -> int:
    return SEGMENT // 8 // pack if kernel == "long_rows" else 256


def work_type(rule: str, number: Any, matrices: int) -> type[ctypes.Structure]:
    """Make the structure Work of kernels.cu."""
    fields = [
        ("matrix", ctypes.c_int * 4 * matrices),
        ("arrays", ctypes.c_void_p * matrices * len(ROLES[rule])),
        ("first_tile", ctypes.c_int * matrices),
        ("numbers", number * 9),
        ("partials", ctypes.c_void_p),
        ("matrices", ctypes.c_int),
    ]
    return type("Work", (ctypes.Structure,), {"_fields_": fields})


def check(
    driver: EmulatedDriver,
    kernel: str,
    rule: str,
    dtype: str,
    matrices: Sequence[Matrix],
    *,
    numbers: tuple[float, ...] | None = None,
    fill: Any = None,
    source: str = SOURCE,
    margin: int = 40,
) -> None:
    """Launch a kernel, and compare all memory around the matrices, bit by bit."""
    fill = fill or random_numbers
    numbers = numbers or NUMBERS[rule]
    is_columns = "columns" in kernel
    random = np.random.default_rng(0)
    arrays, expected = [], []
    for matrix in matrices:
        wholes = {role: _memory(matrix, role, dtype, margin, is_columns) for role in ROLES[rule]}
        for role, whole in wholes.items():
            whole[...] = fill(random, whole.size, dtype, role)
        wanted = {role: whole.copy() for role, whole in wholes.items()}
        views = {role: _view(wanted[role], matrix, role, margin, is_columns) for role in wanted}
        wide = np.float64 if dtype == "float64" else np.float32
        with np.errstate(all="ignore"):
            before = {role: view.astype(wide) for role, view in views.items()}
            result = rules_in_numpy.apply(rule, before, numbers, centralized=kernel != "flat")
            for role, values in result.items():
                views[role][...] = values
        arrays.append(wholes)
        expected.append(wanted)
    _launch(driver, source, kernel, rule, dtype, matrices, arrays, numbers, margin)
    for matrix, wholes, wanted in zip(matrices, arrays, expected, strict=True):
        for role in wholes:
            try:
                assert_same_bits(wholes[role], wanted[role])
            except AssertionError as error:
                raise AssertionError(f"{kernel}, {matrix}, {role}: {error}") from error


def _launch(
    driver: EmulatedDriver,
    source: str,
    kernel: str,
    rule: str,
    dtype: str,
    matrices: Sequence[Matrix],
    arrays: Sequence[dict[str, Any]],
    numbers: tuple[float, ...],
    margin: int,
) -> None:
    pack = 16 // itemsize(dtype)
    is_double = dtype == "float64" or rule.startswith("Sgd")
    number = ctypes.c_double if is_double else ctypes.c_float
    room = len(matrices) + 3
    work = work_type(rule, number, room)()
    blocks = 0
    for m, (matrix, wholes) in enumerate(zip(matrices, arrays, strict=True)):
        count, shares = tiles(kernel, matrix.units, matrix.fan_in, pack)
        line = matrix.units if "columns" in kernel else matrix.fan_in
        work.matrix[m][:] = matrix.units, matrix.fan_in, line + matrix.pad, shares
        for r, (role, whole) in enumerate(wholes.items()):
            start = margin + _shift(matrix, role)
            work.arrays[r][m] = whole.ctypes.data + start * whole.itemsize
        work.first_tile[m] = blocks
        blocks += count
    work.numbers[: len(numbers)] = numbers
    work.matrices = len(matrices)
    partials = np.full(blocks * 8 * pack, np.nan, number if dtype == "float64" else np.float32)
    work.partials = partials.ctypes.data
    for name in ("column_sums", "split_columns") if kernel == "split columns" else (kernel,):
        code = driver.compile(source, options(name, rule, dtype, room))
        function = driver.load(0, code)
        driver.launch(0, function, blocks, threads_of(name, pack), 0, ctypes.addressof(work))


def random_numbers(random: Any, size: int, dtype: str, role: str) -> Any:
    """Draw numbers of many magnitudes, with zeros of both signs and subnormal numbers."""
    x = random.standard_normal(size) * 10.0 ** random.integers(-4, 3, size) + 0.1
    kind = random.random(size)
    x[kind < 0.04] = 0.0
    x[kind < 0.02] = -0.0
    smallest = {"float16": 6e-8, "float64": 5e-324}.get(dtype, 1e-41)
    x[kind > 0.97] = smallest * random.integers(1, 9)
    return np.abs(x) if role == "exp_avg_sq" else x


def _memory(matrix: Matrix, role: str, dtype: str, margin: int, is_columns: bool) -> Any:
    """Make memory for a matrix, with a start that is `shift` elements behind 16 bytes."""
    line, lines = matrix.units, matrix.fan_in
    if not is_columns:
        line, lines = lines, line
    size = lines * (line + matrix.pad) - matrix.pad + 2 * margin + _shift(matrix, role)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    whole = np.empty(size + 16 // kind.itemsize, kind)
    start = -(whole.ctypes.data // kind.itemsize + margin) % (16 // kind.itemsize)
    return whole[start : start + size]


def _view(whole: Any, matrix: Matrix, role: str, margin: int, is_columns: bool) -> Any:
    """See the matrix in its memory, with units first."""
    start, width = margin + _shift(matrix, role), whole.itemsize
    along, apart = width, width * ((matrix.units if is_columns else matrix.fan_in) + matrix.pad)
    strides = (along, apart) if is_columns else (apart, along)
    return np.lib.stride_tricks.as_strided(whole[start:], (matrix.units, matrix.fan_in), strides)


def _shift(matrix: Matrix, role: str) -> int:
    """Misalign roles differently."""
    return matrix.shift * (3 if role in ("out", "weight") else 1)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
