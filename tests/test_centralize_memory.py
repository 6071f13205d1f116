"""`gcx.centralize` and memory: results in `out`, views, and whatever lies under an array."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

import gcx

import canonical_order
from libraries import ArrayLibrary
from reference import centralized, values
from same_bits import assert_same_bits
from test_centralize import WIDE_DTYPES, assert_close

# Views that an array may be written to while it is read, and arrangements of an array in memory.
VIEWS: dict[str, Any] = {
    "upside-down": lambda x: x[::-1],
    "mirrored": lambda x: x[:, ::-1],
    "transposed": lambda x: x.T,
    "whole": lambda x: x[:],
    "reshaped": lambda x: x.reshape(64, 64),
}
ARRANGED: dict[str, Any] = {
    "fortran": np.asfortranarray,
    "reversed": lambda x: x[::-1, ::-1],
    "strided": lambda x: x[::2, ::3],
    "spread": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "rows": lambda x: np.broadcast_to(x[0], x.shape),
    "columns": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "same": lambda x: np.broadcast_to(x[:1, :1], x.shape),
    "byteswapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "unaligned": lambda x: np.frombuffer(b"-" + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
}


class TestOut:
    @pytest.mark.parametrize("layout", ["o...", "...o", "io..."])
    @pytest.mark.parametrize("strength", [1.0, 0.5])
    def test_is_written_and_returned(
        self, writable: ArrayLibrary, layout: str, strength: float
    ) -> None:
        xp = writable
        for dtype in (*WIDE_DTYPES, *xp.narrow_dtypes):
            grad = xp.asarray(values(3, 4, 2), dtype)
            before = xp.numpy(grad)
            options: dict[str, Any] = {"layout": layout, "strength": strength}
            expected = xp.numpy(gcx.centralize(grad, **options))

            out = xp.asarray(np.zeros((3, 4, 2)), dtype)
            assert gcx.centralize(grad, out=out, **options) is out
            np.testing.assert_array_equal(xp.numpy(out), expected)
            np.testing.assert_array_equal(xp.numpy(grad), before)

            assert gcx.centralize(grad, out=grad, **options) is grad
            np.testing.assert_array_equal(xp.numpy(grad), expected)

    @pytest.mark.parametrize("layout", ["o...", "...o"])
    def test_may_be_a_view(self, writable: ArrayLibrary, layout: str) -> None:
        if writable.name == "dask":
            pytest.skip("it has no views")
        for dtype in (*WIDE_DTYPES, *writable.narrow_dtypes):
            grad = writable.asarray(values(4, 6), dtype)
            expected = writable.numpy(gcx.centralize(grad, layout=layout))
            base = writable.asarray(np.full((8, 6), 7.0), dtype)
            gcx.centralize(grad, layout=layout, out=base[::2, :])
            written, between = writable.numpy(base)[::2], writable.numpy(base)[1::2]
            np.testing.assert_allclose(written, expected, rtol=0, atol=2e-6)
            np.testing.assert_array_equal(between, np.full_like(between, 7))

    @pytest.mark.parametrize("shape", [(3, 4), (3,)])
    def test_is_refused_if_immutable(self, xp: ArrayLibrary, shape: tuple[int, ...]) -> None:
        if xp.is_writable:
            pytest.skip("its arrays can be written to")
        grad = xp.asarray(values(*shape))
        with pytest.raises(TypeError, match=r"out cannot be written to.*(immutable|read-only)"):
            gcx.centralize(grad, out=grad)
        np.testing.assert_array_equal(xp.numpy(grad), values(*shape))

    @pytest.mark.parametrize("shape", [(3, 4), (3,)])
    def test_has_the_shape_and_dtype(self, writable: ArrayLibrary, shape: Any) -> None:
        for of_out, dtype, message in (
            ((4, *shape[1:]), "float64", r"out has shape \(4.*\), the gradient \(3"),
            (shape, "float32", r"out has dtype .*float32, the gradient .*float64"),
        ):
            out = writable.asarray(np.zeros(of_out), dtype)
            with pytest.raises(ValueError, match=message):
                gcx.centralize(writable.asarray(values(*shape)), out=out)
            np.testing.assert_array_equal(writable.numpy(out), 0)

    def test_is_of_the_same_library(self, xp: ArrayLibrary) -> None:
        if xp.backend == "numpy":
            pytest.skip("NumPy is the other library")
        grad, other = xp.asarray(values(3, 4)), np.zeros((3, 4))
        with pytest.raises(TypeError, match="out is a ndarray, the gradient a "):
            gcx.centralize(grad, out=other)
        with pytest.raises(TypeError, match=r"out is a .*, the gradient a ndarray"):
            gcx.centralize(other, out=grad)
        np.testing.assert_array_equal(other, 0)
        np.testing.assert_array_equal(xp.numpy(grad), values(3, 4))

    @pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
    @pytest.mark.parametrize("layout", ["o...", "...o"])
    @pytest.mark.parametrize(
        ("dtype", "reproducible"),
        [*product(("float16", "float32"), (False, True)), ("complex64", False)],
    )
    def test_may_overlap_in_numpy(
        self, view: Any, layout: str, dtype: str, reproducible: bool
    ) -> None:
        grad = values(64, 64).astype(dtype)
        expected = gcx.centralize(grad.copy(), layout=layout)
        out = view(grad)
        assert gcx.centralize(grad, layout=layout, out=out, reproducible=reproducible) is out
        np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("shift", [1, 4096, 100_000])
    @pytest.mark.parametrize("layout", ["o...", "...o"])
    @pytest.mark.parametrize("reproducible", [False, True])
    def test_may_be_shifted_in_numpy(self, shift: int, layout: str, reproducible: bool) -> None:
        """With more elements than NumPy's backend handles at a time."""
        memory = values(500_000).astype(np.float32)
        grad = memory[: 96 * 4096].reshape(96, 4096)
        out = memory[shift : shift + grad.size].reshape(grad.shape)
        expected = grad.astype(np.float64)
        expected -= expected.mean(gcx.Layout(layout).fan_in_axes(2), keepdims=True)
        gcx.centralize(grad, layout=layout, out=out, reproducible=reproducible)
        np.testing.assert_allclose(out, expected, rtol=0, atol=4e-6)

    @pytest.mark.parametrize("shape", [(), (5,), (5, 1)])
    def test_out_gets_a_copy(self, writable: ArrayLibrary, shape: tuple[int, ...]) -> None:
        grad, out = writable.asarray(values(*shape)), writable.asarray(np.zeros(shape))
        assert gcx.centralize(grad, out=out) is out
        np.testing.assert_array_equal(writable.numpy(out), values(*shape))


class TestMemory:
    """Whatever lies under an array, its numbers count."""

    @pytest.mark.parametrize("layout", ["o...", "...o"])
    @pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
    def test_views(self, xp: ArrayLibrary, layout: str, dtype: str) -> None:
        base = values(6, 8).astype(dtype)
        axes = gcx.Layout(layout).fan_in_axes(2)
        eps = float(np.finfo(dtype).eps)
        for take in (lambda x: x.T, lambda x: x[1:4, :], lambda x: x[:, 2:7], lambda x: x[:3, :3]):
            result = gcx.centralize(take(xp.asarray(base, dtype)), layout=layout)
            assert_close(xp, result, centralized(take(base), axes), eps)

    @pytest.mark.parametrize("arrange", ARRANGED.values(), ids=ARRANGED)
    @pytest.mark.parametrize("layout", ["o...", "...o", "..."])
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "longdouble"])
    def test_numpy(self, arrange: Any, layout: str, dtype: str) -> None:
        grad = arrange(values(6, 9).astype(dtype))
        before = grad.copy()
        result = gcx.centralize(grad, layout=layout)
        axes = gcx.Layout(layout).fan_in_axes(2)
        eps = max(float(np.finfo(dtype).eps), 1e-15)  # the reference is float64
        np.testing.assert_allclose(result, centralized(grad, axes), rtol=0, atol=16 * eps)
        assert result.dtype == grad.dtype
        assert not np.may_share_memory(result, grad)
        if dtype in canonical_order.DTYPES:
            result = gcx.centralize(grad, layout=layout, reproducible=True)
            assert result.dtype == grad.dtype
            assert_same_bits(
                result.astype(dtype), canonical_order.centralized(grad, axes, dtype).astype(dtype)
            )
        np.testing.assert_array_equal(grad, before)

    @pytest.mark.parametrize("layout", ["o...", "...o"])
    def test_dask_stays_lazy_and_may_not_know_its_shape(self, layout: str) -> None:
        da = pytest.importorskip("dask.array")
        numbers = values(6, 4)
        lazy = da.from_array(numbers, chunks=(2, 3))
        chosen = lazy[lazy[:, 0] > 2.5]
        assert np.isnan(chosen.shape[0])
        result = gcx.centralize(chosen, layout=layout)
        assert isinstance(result, da.Array)
        known = numbers[numbers[:, 0] > 2.5]
        expected = centralized(known, gcx.Layout(layout).fan_in_axes(2))
        np.testing.assert_allclose(result.compute(), expected, rtol=0, atol=1e-14)

    def test_numpy_subclass(self) -> None:
        class Named(np.ndarray):
            pass

        grad = values(3, 4).view(Named)
        result = gcx.centralize(grad)
        assert type(result) is Named
        np.testing.assert_allclose(result, centralized(values(3, 4), (1,)), atol=1e-14)

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_masked_entries_do_not_count(self, dtype: str) -> None:
        grad = np.ma.masked_array(
            np.array([[1, 3, 99], [5, 99, 9], [99, 99, 99]], dtype),
            [[False, False, True], [False, True, False], [True, True, True]],
        )
        expected = np.array([[-1, 1, 0], [-2, 0, 2], [0, 0, 0]])
        in_place = grad.copy()
        for result in (gcx.centralize(grad), gcx.centralize(in_place, out=in_place)):
            assert result.dtype == dtype
            np.testing.assert_array_equal(result.mask, grad.mask)
            np.testing.assert_array_equal(result.filled(0), expected)
