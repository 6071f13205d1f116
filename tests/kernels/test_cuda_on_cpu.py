"""The CUDA kernel, run on the CPU from the same source, behind the whole of the CuPy backend."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ml_dtypes")

import gcx

import cuda_on_cpu
from canonical_order import DTYPES
from cuda_on_cpu import CupyOnCpu
from cupy_cases import (
    COLUMNS,
    FEW,
    LONG_COLUMNS,
    OTHERS,
    ROWS,
    SMALL,
    Case,
    canonical,
    centralize,
    numbers,
)
from cupy_stand_in import Array
from planted import replaced
from same_bits import assert_same_bits

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

ELEMENTS = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, folder: Path) -> CupyOnCpu:
    return cuda_on_cpu.install(monkeypatch, folder)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits(dtype: str, cupy: CupyOnCpu) -> None:
    cases = [*ROWS, *COLUMNS, *OTHERS, *(LONG_COLUMNS if dtype == "float32" else ())]
    grads = [case.part(array(case, dtype)) for case in cases]
    before = [grad.copy() for grad in grads]
    for case, grad, old, result in zip(cases, grads, before, centralize(grads, cases), strict=True):
        assert result.dtype == grad.dtype
        assert_same_bits(result, canonical(old, case))
        assert_same_bits(grad, old)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_in_place(dtype: str, cupy: CupyOnCpu) -> None:
    cases = [*ROWS[:5], *COLUMNS[2:5], *OTHERS]
    wholes = [array(case, dtype) for case in cases]
    expected = [whole.copy() for whole in wholes]
    for case, whole in zip(cases, expected, strict=True):
        case.part(whole)[...] = canonical(case.part(whole), case, 0.3)
    grads = [case.part(whole) for case, whole in zip(cases, wholes, strict=True)]
    results = centralize(grads, cases, grads, strength=0.3)
    assert all(result is grad for result, grad in zip(results, grads, strict=True))
    for whole, wanted in zip(wholes, expected, strict=True):
        assert_same_bits(whole, wanted)  # and nothing is written beside the part
    assert len(cupy.kernels[ELEMENTS[dtype]].blocks) == 2  # as one goes through a copy


def test_order_of_memory_where_any_will_do(cupy: CupyOnCpu) -> None:
    case = Case((6, 3, 3, 500), (1, 2, 3))
    grad = array(case, "float32")
    result = gcx.centralize(grad.transpose(0, 3, 1, 2))
    assert_same_bits(result.transpose(0, 2, 3, 1), canonical(grad, case))


def test_the_last_tile_to_arrive_leaves_the_counter_at_zero(cupy: CupyOnCpu) -> None:
    case = Case((700, 40), (0,))
    grad = array(case, "float32")
    for _ in range(2):
        assert_same_bits(centralize([grad], [case])[0], canonical(grad, case))
    assert cupy.kernels["float"].blocks == [16, 16]


def test_a_launch_for_each_dtype_and_as_many_arrays_as_it_holds(cupy: CupyOnCpu) -> None:
    dtypes = ["float32"] * 130 + ["float64"] * 130 + ["float32"] * 130
    grads = [array(SMALL, dtype) for dtype in dtypes]
    results = centralize(grads, [SMALL] * len(grads))
    for grad, result in zip(grads, results, strict=True):
        assert_same_bits(result, canonical(grad, SMALL))
    assert cupy.kernels["float"].blocks == [240, 20]
    assert cupy.kernels["double"].blocks == [130]


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_fit_into_a_launch(dtype: str, cupy: CupyOnCpu) -> None:
    gcx.centralize(array(SMALL, dtype))
    addresses, *tables, strength = cupy.kernels[ELEMENTS[dtype]].arguments
    assert addresses.nbytes + 8 * len(tables) + strength.nbytes <= 4096  # on all drivers


def test_division_by_a_reciprocal(cupy: CupyOnCpu) -> None:
    from gcx.backends import _cupy_kernels

    rng = np.random.default_rng(0)
    for divisor in {*range(1, 100), *rng.integers(1, _cupy_kernels.MOST, 1000).tolist()}:
        reciprocal, shift = _cupy_kernels.reciprocal(divisor)
        assert reciprocal < 2**32
        last = 2**30 // divisor * divisor
        for number in (0, divisor - 1, divisor, 2 * divisor - 1, last - 1, last, 2**30 - 1):
            assert number * reciprocal >> shift == number // divisor


def test_arrays_that_share_memory_are_done_one_after_the_other(cupy: CupyOnCpu) -> None:
    whole = array(SMALL, "float32")
    expected = whole.copy()
    grads = [whole[:4], whole[2:], whole]
    for part in (expected[:4], expected[2:], expected):
        part[...] = canonical(part, SMALL, 0.5)
    centralize(grads, [SMALL] * 3, grads, strength=0.5)
    assert_same_bits(whole, expected)
    assert len(cupy.kernels["float"].blocks) == 3


def test_one_array_is_read_several_times(cupy: CupyOnCpu) -> None:
    grad = array(SMALL, "float32")
    for result in centralize([grad, grad], [SMALL] * 2):
        assert_same_bits(result, canonical(grad, SMALL))
    assert len(cupy.kernels["float"].blocks) == 1


@pytest.mark.parametrize("moved", [0, 1, -50, 50, 300])
def test_out_that_overlaps_the_gradient(moved: int, cupy: CupyOnCpu) -> None:
    whole = cupy.asarray(np.random.default_rng(0).normal(size=1000))
    grad, out = (whole[start : start + 300].reshape(6, 50) for start in (100, 100 + moved))
    expected = canonical(grad, SMALL)
    (result,) = centralize([grad], [SMALL], [out])
    assert result is out
    assert_same_bits(out, expected)


def test_out_of_other_strides(cupy: CupyOnCpu) -> None:
    grad = array(SMALL, "float32")
    out = cupy.zeros((50, 6), "float32").T
    centralize([grad], [SMALL], [out])
    assert_same_bits(out, canonical(grad, SMALL))


def test_expanded_arrays_are_read_and_not_written_to(cupy: CupyOnCpu) -> None:
    grad = np.broadcast_to(array(Case((1, 9), (1,)), "float32"), (4, 9), subok=True)
    assert_same_bits(gcx.centralize(grad), canonical(grad, SMALL))
    with pytest.raises(TypeError, match="cannot be written to"):
        gcx.centralize(grad, out=grad)


@pytest.mark.parametrize("reproducible", [False, True])
def test_no_elements(reproducible: bool, cupy: CupyOnCpu) -> None:
    grad = cupy.zeros((0, 3), "float32")
    assert gcx.centralize(grad, reproducible=reproducible).shape == (0, 3)
    assert not cupy.kernels


def is_captured(cupy: CupyOnCpu) -> None:
    cupy.is_capturing = True


def is_rocm(cupy: CupyOnCpu) -> None:
    cupy.cuda.runtime.is_hip = True


def is_too_long(cupy: CupyOnCpu) -> None:
    from gcx.backends import _cupy

    _cupy.MOST = 40  # of this test's own module


@pytest.mark.parametrize(
    ("hinder", "dtype", "reason"),
    [
        (is_captured, "float32", "CUDA graph"),
        (is_rocm, "float32", "ROCm"),
        (is_too_long, "float32", r"shape \(6, 50\)"),
        (lambda cupy: None, "complex64", "not complex64"),
    ],
)
def test_what_the_kernel_does_not_take(
    hinder: Callable[[CupyOnCpu], None], dtype: str, reason: str, cupy: CupyOnCpu
) -> None:
    hinder(cupy)
    grad = cupy.asarray(np.random.default_rng(0).normal(size=(6, 50)).astype(dtype))
    exact = grad - grad.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(gcx.centralize(grad), exact, rtol=0, atol=1e-5)
    with pytest.raises(TypeError, match=reason):
        gcx.centralize(grad, reproducible=True)
    assert not cupy.kernels


@pytest.mark.parametrize("flags", cuda_on_cpu.SANITIZERS.values(), ids=cuda_on_cpu.SANITIZERS)
def test_sanitizers_have_nothing_to_report(
    flags: cuda_on_cpu.Flags, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    cuda_on_cpu.install(monkeypatch, folder, flags)
    check_few("float32")


WRONG_BITS = {
    "another tree": replaced(
        "numbers[n] = add(numbers[n], numbers[n + half]);",
        "numbers[n] = add(numbers[2 * n], numbers[2 * n + 1]);",
    ),
    "padded with 0.0": replaced("NOTHING = -0.0", "NOTHING = 0.0"),
    "the reciprocal": replaced(
        "divide(sum, static_cast<Wide>(job.matrix.fan_in))",
        "multiply(sum, divide(1, static_cast<Wide>(job.matrix.fan_in)))",
    ),
    "counters that stay": replaced("atomicInc(counter, blocks - 1)", "atomicInc(counter, ~0u)"),
}


RACES = {
    "no barrier between threads": replaced(
        "    __syncthreads();\n    const int first =", "    const int first ="
    ),
    "no barrier between segments": replaced(
        "    __syncthreads();  // before the next segment's sums go where these were read\n"
        "  }\n  Wide means",
        "  }\n  Wide means",
    ),
    "no barrier before arriving": replaced(
        "  __syncthreads();\n  if (threadIdx.x == 0)", "  if (threadIdx.x == 0)"
    ),
    "no fence before arriving": replaced("    __threadfence();\n", ""),
    "no fence after arriving": replaced("if (is_last) __threadfence();", ""),
    "no barrier after arriving": replaced(
        "  __syncthreads();\n  return is_last;", "  return is_last;"
    ),
}


WILD_ACCESSES = {
    "rows that are not there": replaced("unit < matrix.units ? matrix.fan_in : 0", "matrix.fan_in"),
    "packs that are not aligned": replaced(
        "matrix.packed && addresses", "matrix.packed || addresses"
    ),
}


FOUND = [
    (WRONG_BITS, (), AssertionError, "elements differ"),
    (RACES, cuda_on_cpu.SANITIZERS["thread"], cuda_on_cpu.LaunchError, "data race"),
    (
        WILD_ACCESSES,
        cuda_on_cpu.SANITIZERS["memory"],
        cuda_on_cpu.LaunchError,
        r"heap-buffer-overflow|misaligned address",
    ),
]


@pytest.mark.parametrize(
    ("fault", "found"),
    [pytest.param(fault, f, id=name) for faults, *f in FOUND for name, fault in faults.items()],
)
def test_a_fault_is_found(
    fault: cuda_on_cpu.Edit, found: Any, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    flags, error, match = found
    cuda_on_cpu.install(monkeypatch, folder, flags, fault)
    with pytest.raises(error, match=match):
        check_few("float32")


def check_few(dtype: str) -> None:
    """Check bits in place, twice with the same tables."""
    for _ in range(2):
        grads = [case.part(array(case, dtype)) for case in FEW]
        expected = [canonical(grad, case) for grad, case in zip(grads, FEW, strict=True)]
        centralize(grads, FEW, grads)
        for grad, wanted in zip(grads, expected, strict=True):
            assert_same_bits(grad, wanted)


def array(case: Case, dtype: str) -> Array:
    return numbers(case, dtype).view(Array)
