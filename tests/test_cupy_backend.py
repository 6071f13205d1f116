"""The logic of the CuPy backend where there is no GPU, with NumPy in the place of CuPy.

CuPy computes nothing without a GPU. So this shows that the backend calls CuPy's own operations
rightly, which it does where its kernel is not for (as on ROCm), and nothing about CuPy itself or
its accuracy. The kernel is run in `tests/kernels`. On a machine with a GPU the `xp` fixture runs
all tests on CuPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gcx

import cupy_stand_in
from reference import centralized


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend, with NumPy for CuPy."""
    return cupy_stand_in.install(monkeypatch, cupy_stand_in.StandIn(is_hip=True))


def values(*shape: int) -> Any:
    numbers = np.random.default_rng(0).normal(loc=3.0, size=shape)
    return numbers.view(cupy_stand_in.Array)


@pytest.mark.parametrize("layout", ["o...", "...o", "io..."])
@pytest.mark.parametrize("strength", [1.0, 0.25])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_wide_dtypes(layout: str, strength: float, dtype: str) -> None:
    grad = values(3, 4, 2).astype(dtype)
    before = grad.copy()
    options: dict[str, Any] = {"layout": layout, "strength": strength}
    wide = grad.astype(np.complex128)
    exact = (1 - strength) * wide + strength * centralized(wide, gcx.Layout(layout).fan_in_axes(3))
    result = gcx.centralize(grad, **options)
    assert result.dtype == dtype
    np.testing.assert_allclose(result, exact, rtol=0, atol=16 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(grad, before)

    out = np.zeros_like(grad)
    assert gcx.centralize(grad, out=out, **options) is out
    np.testing.assert_array_equal(out, result)
    assert gcx.centralize(grad, out=grad, **options) is grad
    np.testing.assert_array_equal(grad, result)


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_low_precision_is_rounded_once(strength: float) -> None:
    grad = (np.arange(-8, 8).reshape(2, 8) / 4).astype(np.float16).view(cupy_stand_in.Array)
    before = grad.copy()
    wide = grad.astype(np.float32)
    exact = wide - np.float32(strength) * wide.mean(axis=1, keepdims=True)
    result = gcx.centralize(grad, strength=strength)
    assert result.dtype == np.float16
    np.testing.assert_array_equal(result, exact.astype(np.float16))
    np.testing.assert_array_equal(grad, before)
    assert gcx.centralize(grad, strength=strength, out=grad) is grad
    np.testing.assert_array_equal(grad, result)


def test_low_precision_sums_in_float32() -> None:
    grad = np.full_like(values(2, 4), 40000.0, np.float16)  # the sum is beyond float16
    np.testing.assert_array_equal(gcx.centralize(grad), 0)


def test_dtypes_that_are_not_floating_are_refused() -> None:
    with pytest.raises(TypeError, match="floating dtype, not int64"):
        gcx.centralize(values(2, 3).astype(int))


def test_nothing_to_centralize() -> None:
    for grad in (values(5), values(5, 1), values(3, 0)):
        assert gcx.centralize(grad) is grad
    assert gcx.centralize(values(0, 3)).shape == (0, 3)


def test_writable(backend: Any) -> None:
    assert backend.is_writable(*[values(1, 3)] * 2)
    repeated = np.broadcast_to(values(1, 3), (2, 3), subok=True)
    assert not backend.is_writable(repeated, repeated)


def test_what_the_kernel_does_not_take_is_not_promised() -> None:
    with pytest.raises(TypeError, match="reproducible=True on CuPy is not for ROCm"):
        gcx.centralize(values(2, 3), reproducible=True)


def test_many() -> None:
    grads = [values(2, 3), values(4, 5).T]
    results = gcx.centralize_many(grads, layouts=["o...", "...o"])
    for grad, result, axis in zip(grads, results, (1, 0), strict=True):
        np.testing.assert_array_equal(result, gcx.centralize(grad, axis=axis))


def test_real_cupy_is_imported_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    from gcx import backends

    library = backends.load("cupy")
    assert library.cp is cupy
    assert bool(library.devices()) == cupy.is_available()
