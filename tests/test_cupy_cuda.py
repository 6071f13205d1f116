"""CUDA kernels on a GPU, behind CuPy: bits, streams, devices, graphs."""

from __future__ import annotations

from collections.abc import Sequence

import cupy as cp
import pytest

import gcx
from gcx.backends import _cupy

from canonical_order import DTYPES
from kernel_cases import ALL, SMALL, Case, canonical, centralize, numbers
from same_bits import assert_same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cp.is_available(), reason="there is no CUDA device"),
]

# Too large for the tests without a GPU: more tiles than run at once.
LARGE = [
    Case((40, 150528), (1,)),
    Case((150528, 40), (0,)),
    Case((3000, 4096), (1,)),
    Case((4096, 3000), (0,)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cases", [ALL, LARGE], ids=["all", "large"])
def test_bits(cases: Sequence[Case], dtype: str) -> None:
    wholes = [numbers(case, dtype) for case in cases]
    there = [cp.asarray(whole) for whole in wholes]
    grads = [case.part(whole) for case, whole in zip(cases, there, strict=True)]
    results = centralize(grads, cases)
    centralize(grads, cases, grads, strength=0.3)
    for case, whole, found, result in zip(cases, wholes, there, results, strict=True):
        assert_same_bits(result.get(), canonical(case.part(whole), case))
        case.part(whole)[...] = canonical(case.part(whole), case, 0.3)
        assert_same_bits(found.get(), whole)


def test_streams_share_no_sums() -> None:
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


def test_graph() -> None:
    case = Case((300, 40), (0,))
    values = numbers(case, "float32")
    grad = cp.asarray(values)
    with cp.cuda.Stream(non_blocking=True) as stream:
        gcx.centralize(grad, layout="io", reproducible=True)
        out = cp.empty_like(grad)
        stream.begin_capture()
        gcx.centralize(grad, layout="io", out=out, reproducible=True)
        graph = stream.end_capture()
        for factor in (1, -2, 4):
            grad[...] = cp.asarray(values * factor)
            graph.launch(stream)
            stream.synchronize()
            assert_same_bits(out.get(), canonical(values * factor, case))
    assert not _cupy.why_no_kernels(grad)
