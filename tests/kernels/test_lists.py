"""Lists of arrays through the public functions: bits, strides, shared memory, captures."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest

import gcx
from benchmarks.gpu.bits import bits_of
from gcx.backends.cuda.tables import find_walk, make_launches

from canonical_order import DTYPES
from emulated_libraries import CupyOnCpu, make
from kernel_cases import ALL, COLUMNS, OTHERS, ROWS, SMALL, Case, canonical, centralize
from same_bits import assert_same_bits


def cases_of(library: CupyOnCpu) -> list[Case]:
    """List the cases; torch has no negative strides."""
    reversed_ones = [case for name, case in OTHERS.items() if "reversed" in name]
    return [c for c in ALL if library.name == "cupy" or c not in reversed_ones]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits(library: CupyOnCpu, dtype: str) -> None:
    cases = cases_of(library)
    wholes, grads = zip(*(make(library, case, dtype) for case in cases), strict=True)
    before = [whole.copy() for whole in wholes]
    results = centralize(grads, cases)
    for case, whole, old, result in zip(cases, wholes, before, results, strict=True):
        assert_same_bits(library.numpy(result), canonical(case.part(old), case))
        assert_same_bits(whole, old)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_in_place(library: CupyOnCpu, dtype: str) -> None:
    cases = cases_of(library)
    wholes, grads = zip(*(make(library, case, dtype) for case in cases), strict=True)
    expected = [whole.copy() for whole in wholes]
    for case, whole in zip(cases, expected, strict=True):
        case.part(whole)[...] = canonical(case.part(whole), case, 0.3)
    results = centralize(grads, cases, grads, strength=0.3)
    assert all(result is grad for result, grad in zip(results, grads, strict=True))
    for whole, wanted in zip(wholes, expected, strict=True):
        assert_same_bits(whole, wanted)  # nothing is written beside the part
    launched = Counter(launch.kernel for launch in library.driver.launches)
    each = ("rows", "long_rows", "columns", "column_sums", "split_columns")
    assert launched == dict.fromkeys(each, 1)


def test_any_order_of_memory(library: CupyOnCpu) -> None:
    """Without `reproducible`, rows are read as they lie; with it, the same list is not."""
    case = OTHERS["channels last"]
    whole, grad = make(library, case, "float32")
    in_order = case.part(canonical(whole, Case(case.shape, (1, 2, 3))))
    for reproducible in (False, False, True):
        (result,) = gcx.centralize_many([grad], reproducible=reproducible)
        expected = canonical(case.part(whole), case) if reproducible else in_order
        assert_same_bits(library.numpy(result), expected)
    assert [launch.kernel for launch in library.driver.launches][:2] == ["rows", "rows"]


def test_launches_for_each_dtype(library: CupyOnCpu) -> None:
    cases = [*ROWS[:4], *COLUMNS[:2]] * 4
    grads = [make(library, case, DTYPES[k // 6])[1] for k, case in enumerate(cases)]
    centralize(grads, cases)
    elements = ("Half", "BFloat16", "float", "double")
    expected = {(kernel, element) for kernel in ("rows", "columns") for element in elements}
    launched = [(launch.kernel, launch.element) for launch in library.driver.launches]
    assert len(launched) == 8
    assert {*launched} == expected


MEMORY = Case((24, 50), (1,))


def test_neighbours_in_memory_are_launched_together(library: CupyOnCpu) -> None:
    whole, _ = make(library, MEMORY, "float32")
    places = [slice(0, 10), slice(10, 18), slice(18, 24)]
    expected = canonical(whole, SMALL)
    grads = [library.see(whole, whole[place]) for place in places]
    centralize(grads, [SMALL] * 3, grads)
    assert_same_bits(whole, expected)
    assert len(library.driver.launches) == 1
    for result in centralize([grads[0]] * 2, [SMALL] * 2):  # read twice
        assert_same_bits(library.numpy(result), canonical(whole[:10], SMALL))
    assert len(library.driver.launches) == 2


@pytest.mark.parametrize("moved", [0, 1, -50, 50, 300])
def test_out_that_overlaps_the_gradient(library: CupyOnCpu, moved: int) -> None:
    whole = np.random.default_rng(0).normal(size=1000)
    grad, out = (whole[start : start + 300].reshape(6, 50) for start in (100, 100 + moved))
    expected = canonical(grad, SMALL)
    seen, to = library.see(whole, grad), library.see(whole, out)
    (result,) = centralize([seen], [SMALL], [to])
    assert result is to
    assert_same_bits(out, expected)


@pytest.mark.parametrize(
    "part",
    [lambda x: x[:300].reshape(50, 6).T, lambda x: x.reshape(6, 100)[:, :50]],
    ids=["turned", "wider"],
)
def test_out_of_other_strides(library: CupyOnCpu, part: Any) -> None:
    whole, grad = make(library, SMALL, "float32")
    memory = np.zeros(600, np.float32)
    out = part(memory)
    centralize([grad], [SMALL], [library.see(memory, out)])
    assert_same_bits(out, canonical(whole, SMALL))


def test_expanded_arrays_are_read_and_not_written_to(library: CupyOnCpu) -> None:
    row = np.random.default_rng(0).normal(size=(1, 50))
    whole = np.broadcast_to(row, (6, 50))
    grad = library.see(row, whole)
    found = gcx.centralize(grad, reproducible=True)
    assert_same_bits(library.numpy(found), canonical(whole, SMALL))
    with pytest.raises(TypeError, match="cannot be written to"):
        gcx.centralize(grad, out=grad)


def test_other_arrays_are_left_to_the_library(library: CupyOnCpu) -> None:
    rng = np.random.default_rng(0)
    for x in (rng.normal(size=(6, 50)).astype(np.complex64), np.zeros((0, 3), np.float32)):
        found = library.numpy(gcx.centralize(library.see(x, x)))
        exact = x - x.mean(axis=1, keepdims=True) if x.size else x
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5)
    assert not library.driver.launches


@pytest.mark.parametrize("reproducible", [False, True])
def test_captures(library: CupyOnCpu, reproducible: bool) -> None:
    """A graph gets launches of any number of lists, once the kernels are loaded."""
    cases = [SMALL, *COLUMNS[4:7]]

    def run(count: int) -> None:
        for _ in range(count):
            pairs = [make(library, case, "float32") for case in cases]
            grads = [grad for _, grad in pairs]
            layouts = ["oi", "io", "io", "io"]
            gcx.centralize_many(grads, layouts=layouts, out=grads, reproducible=reproducible)
            for case, (whole, _) in zip(cases, pairs, strict=True):
                expected = canonical(make(library, case, "float32")[0], case)
                if reproducible:
                    assert_same_bits(whole, expected)
                else:
                    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-4)

    library.capture(on=True)
    with pytest.warns(RuntimeWarning, match="make one step before the capture") as warned:
        run(2)
    assert len(warned) == 1
    assert not library.driver.launches
    library.capture(on=False)
    with warnings.catch_warnings(action="error"):
        run(1)
        each = len(library.driver.launches)
        library.capture(on=True)
        run(5)
    assert len(library.driver.launches) == 6 * each


def test_what_the_check_on_a_gpu_asks(library: CupyOnCpu) -> None:
    device = {"torch": "cpu", "cupy": "cuda:0"}[library.name]
    rows = [*bits_of(library.name, device, (9, 144))]
    assert len(rows) == 6 * len(DTYPES)
    assert all(row.ok for row in rows), rows
    assert library.driver.launches


def test_more_tiles_than_the_kernels_count_are_left_out() -> None:
    units = {0: 1 << 20, 1: (1 << 29) - 1}
    walks = {k: find_walk((4, n), (n, 1), (0,), any_order=False) for k, n in units.items()}
    given = {k: walk for k, walk in walks.items() if walk is not None}
    assert given.keys() == walks.keys()
    launches = make_launches(0, "Store", "float32", given, large=False)
    assert [launch.places for launch in launches] == [[0]]
