"""The CUDA kernel on a GPU, behind CuPy: bits, streams, devices; what else only a GPU can show."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

pytest.importorskip("cupy")
pytest.importorskip("ml_dtypes")

import cupy as cp
from cupy_cases import (
    COLUMNS,
    LONG_COLUMNS,
    OTHERS,
    ROWS,
    SMALL,
    Case,
    canonical,
    centralize,
    numbers,
)

import gcx
from gcx.backends import _cupy_kernels

from canonical_order import DTYPES
from same_bits import assert_same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cp.is_available(), reason="there is no CUDA device"),
]

# Too large for the tests without a GPU: a segment of columns and more, more tiles than run at once.
LARGE = [
    Case((40, 150528), (1,)),
    Case((150528, 40), (0,)),
    Case((3000, 4096), (1,)),
    Case((4096, 3000), (0,)),
]
ALL = [*ROWS, *COLUMNS, *LONG_COLUMNS, *OTHERS]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The dtypes of the launches that a test makes."""
    made = []
    kernel = _cupy_kernels._kernel

    def counting(dtype: str) -> Callable[..., None]:
        made.append(dtype)
        return kernel(dtype)  # type: ignore[no-any-return]

    monkeypatch.setattr(_cupy_kernels, "_kernel", counting)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cases", [ALL, LARGE], ids=["all", "large"])
def test_bits(cases: Sequence[Case], dtype: str) -> None:
    wholes = [numbers(case, dtype) for case in cases]
    parts = [case.part(cp.asarray(whole)) for case, whole in zip(cases, wholes, strict=True)]
    results = centralize(parts, cases)
    for case, whole, result in zip(cases, wholes, results, strict=True):
        assert_same_bits(result.get(), canonical(case.part(whole), case))


def test_one_launch_for_each_dtype(launches: list[str]) -> None:
    cases = [*ROWS, *COLUMNS]
    grads = [cp.asarray(numbers(case, dtype)) for dtype in DTYPES for case in cases]
    centralize(grads, cases * len(DTYPES))
    assert launches == [*DTYPES]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_in_place(dtype: str) -> None:
    wholes = [numbers(case, dtype) for case in ALL]
    there = [cp.asarray(whole) for whole in wholes]
    grads = [case.part(whole) for case, whole in zip(ALL, there, strict=True)]
    centralize(grads, ALL, grads, strength=0.3)
    for case, whole, found in zip(ALL, wholes, there, strict=True):
        case.part(whole)[...] = canonical(case.part(whole), case, 0.3)
        assert_same_bits(found.get(), whole)


def test_the_same_bits_again_and_again() -> None:
    cases = [*COLUMNS, *LARGE]
    grads = [cp.asarray(numbers(case, "float32")) for case in cases]
    first = centralize(grads, cases)
    for _ in range(50):
        for result, before in zip(centralize(grads, cases), first, strict=True):
            assert bool((result.view("u4") == before.view("u4")).all())


def test_streams_do_not_share_counters() -> None:
    cases = LARGE[1::2]
    wholes = [numbers(case, "float32") for case in cases]
    expected = [canonical(whole, case) for whole, case in zip(wholes, cases, strict=True)]
    grads = [cp.asarray(whole) for whole in wholes]
    cp.cuda.Device().synchronize()
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(4)]
    found = []
    for _ in range(20):
        for stream in streams:
            with stream:
                found.append(centralize(grads, cases))
    cp.cuda.Device().synchronize()
    for results in found:
        for result, wanted in zip(results, expected, strict=True):
            assert_same_bits(result.get(), wanted)


def test_addresses_change_from_launch_to_launch() -> None:
    kept = []
    for k in range(200):
        grad = cp.asarray(numbers(SMALL, "float32")) * k
        wanted = canonical(grad.get(), SMALL)
        kept.append((grad, gcx.centralize(grad, out=grad), wanted))
    for _, result, wanted in kept:
        assert_same_bits(result.get(), wanted)


def test_arrays_are_handled_on_their_device() -> None:
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one device")
    grads = []
    for k in range(2):
        with cp.cuda.Device(k):
            grads.append(cp.asarray(numbers(SMALL, "float32")))
    for k, result in enumerate(centralize(grads, [SMALL] * 2)):
        assert result.device.id == k
        assert_same_bits(result.get(), canonical(numbers(SMALL, "float32"), SMALL))


def test_what_is_captured_is_not_for_the_kernel(launches: list[str]) -> None:
    grad = cp.asarray(numbers(SMALL, "float32"))
    with cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        with pytest.raises(TypeError, match="CUDA graph"):
            gcx.centralize(grad, out=grad, reproducible=True)
        stream.end_capture()
    assert not launches
