"""Kernels run on a CPU: they give the same bits as the rules in NumPy, and write nothing else."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

from canonical_order import DTYPES
from emulated_cuda import EmulatedDriver, Launch
from launched import (
    KERNELS,
    NUMBERS,
    SEGMENT,
    Matrix,
    Variant,
    check,
    negative_zeros,
    random_numbers,
)
from rules_in_numpy import RULES

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

# Units and fan-in, on both sides of each boundary: of a row that lanes, warps or a block hold, of a
# tile, and of a segment.
IN_ROWS = [
    *[(64, 1), (37, 2), (7, 3), (37, 9), (33, 63), (64, 64), (9, 65), (64, 147)],
    *[(3, 511), (3, 512), (3, 513), (16, 576), (9, 1000), (5, 1024), (3, 1025)],
    *[(7, 1152), (4, 2047), (4, 2048), (3, 2049), (2, 2304), (2, 4096), (2, 4097)],
    *[(2, 8191), (2, 8192), (1, 8193), (1, 16383), (1, 16384)],
]
LONG_ROWS = [
    *[(3, 7), (2, 4608), (1, 8193), (2, 16383), (2, 16384), (3, 16385), (1, 40000)],
    *[(1, 50257)],
]
IN_COLUMNS = [(7, 1), (7, 3), (64, 9), (33, 63), (40, 64), (64, 127), (9, 128)]
SPLIT_COLUMNS = [
    *[(33, 129), (40, 255), (33, 256), (33, 257), (20, 511), (64, 576), (33, 768), (16, 1000)],
    *[(8, 3072), (9, 4097), (3, 16383), (8, 16384), (9, 16385), (2, 33000)],
]
FLAT = [(1, 1), (1, 5), (1, 1000), (1, 2048), (1, 8192), (1, 9000), (1, 20001)]
SHAPES = dict(zip(KERNELS, (IN_ROWS, LONG_ROWS, IN_COLUMNS, SPLIT_COLUMNS, FLAT), strict=True))

every_variant = pytest.mark.parametrize(
    "variant",
    [Variant(k, rule, dtype) for dtype in DTYPES for rule in RULES for k in KERNELS],
    ids="-".join,
)
every_kernel = pytest.mark.parametrize(
    "variant", [Variant(k, "Store", dtype) for dtype in DTYPES for k in KERNELS], ids="-".join
)


def matrices_of(variant: Variant, *, pad: int = 0, shift: int = 0) -> list[Matrix]:
    shapes = SHAPES[variant.kernel]
    if variant.kernel == "rows":  # those that a block holds
        shapes = [(units, fan_in) for units, fan_in in shapes if fan_in <= 2048 * variant.pack]
    return [Matrix(*shape, 0 if variant.kernel == "flat" else pad, shift) for shape in shapes]


def drivers() -> list[EmulatedDriver]:
    """Make a driver for each order of threads, since a race shows in one."""
    return [EmulatedDriver(), EmulatedDriver(falling=True)]


def launches_of(used: list[EmulatedDriver]) -> list[Launch]:
    return [launch for driver in used for launch in driver.launches]


@every_variant
def test_aligned_arrays(variant: Variant) -> None:
    check(used := drivers(), variant, matrices_of(variant))
    # Some sizes of the list are multiples of 16 bytes, and others are not.
    assert all(launch.packed and launch.elementwise for launch in launches_of(used))


@every_variant
def test_misaligned_arrays(variant: Variant) -> None:
    check(used := drivers(), variant, matrices_of(variant, shift=1))
    assert not any(launch.packed for launch in launches_of(used))


@every_kernel
def test_sizes_in_packs(variant: Variant) -> None:
    pack = variant.pack
    units = 1 if variant.kernel == "flat" else 8 * pack
    fan_in = SEGMENT + 8 * pack if variant.kernel == "long_rows" else 128
    check(used := drivers(), variant, [Matrix(units, fan_in)])
    assert all(launch.packed and not launch.elementwise for launch in launches_of(used))


@pytest.mark.parametrize("rule", ["Store", "AdamW"])
@every_kernel
def test_padded_steps(variant: Variant, rule: str) -> None:
    variant = variant._replace(rule=rule)
    check(used := drivers(), variant, matrices_of(variant, pad=variant.pack))
    assert all(launch.packed for launch in launches_of(used))
    check(drivers(), variant, matrices_of(variant, pad=3)[::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["SgdMomentum", "SgdMomentumRate"])
@pytest.mark.parametrize("is_nesterov", [0.0, 1.0])
@pytest.mark.parametrize("is_first", [0.0, 1.0])
def test_options_of_sgd(dtype: str, rule: str, is_nesterov: float, is_first: float) -> None:
    numbers = (*NUMBERS[rule][:6], is_first, is_nesterov)
    for kernel in KERNELS:
        variant = Variant(kernel, rule, dtype)
        check([EmulatedDriver()], variant, matrices_of(variant)[:4], numbers=numbers)


def zeros(random: Any, size: int, dtype: str, role: str) -> Any:
    return np.copysign(0.0, random.standard_normal(size) - 0.8)


def subnormals(random: Any, size: int, dtype: str, role: str) -> Any:
    smallest = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}
    return random.integers(-100, 100, size) * smallest.get(dtype, 5e-324)


def with_infinities(random: Any, size: int, dtype: str, role: str) -> Any:
    """The gradients have a few of them, whose units are lost."""
    x = random_numbers(random, size, dtype, role)
    if role == "grad":
        x[random.integers(0, size, 2)] = np.inf, np.nan
    return x


@pytest.mark.parametrize("fill", [zeros, negative_zeros, subnormals, with_infinities])
@every_kernel
def test_special_numbers(variant: Variant, fill: Any) -> None:
    for shift in (0, 1):
        check([EmulatedDriver()], variant, matrices_of(variant, shift=shift), fill=fill)


def test_as_many_matrices_as_a_launch_holds() -> None:
    for count in (1, 2, 63, 112, 900):
        driver = EmulatedDriver()
        check([driver], Variant("rows", "Store", "float32"), [Matrix(5, 12)] * count)
        assert [launch.blocks for launch in driver.launches] == [count]
