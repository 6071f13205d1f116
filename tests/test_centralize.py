"""`gcx.centralize` on every library: what it computes, what it keeps, what it refuses."""

from __future__ import annotations

from collections import UserList
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import gcx

import canonical_order
from libraries import ArrayLibrary
from reference import centralized
from same_bits import assert_same_bits

WIDE_DTYPES = ["float32", "float64", "complex64", "complex128"]


def values(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(loc=3.0, size=shape)


def assert_close(xp: ArrayLibrary, result: Any, expected: Any, eps: float = 1e-14) -> None:
    np.testing.assert_allclose(xp.numpy(result), expected, rtol=0, atol=16 * eps)


@pytest.fixture
def writable(xp: ArrayLibrary) -> ArrayLibrary:
    if not xp.is_writable:
        pytest.skip("its arrays cannot be written to")
    return xp


@pytest.fixture
def immutable(xp: ArrayLibrary) -> ArrayLibrary:
    if xp.is_writable:
        pytest.skip("its arrays can be written to")
    return xp


# Shapes, options that do not fit them, and the error.
MATRIX = (3, 4)
NO_AXIS = r"axis .* out of range .*shape \(3, 4\)"
STRENGTHS = (-0.1, 1.1, float("nan"), "1", None, 1j)
REFUSED: list[tuple[tuple[int, ...], dict[str, Any], type[Exception], str]] = [
    (MATRIX, {"strength": np.array([0.5, 0.5])}, TypeError, "strength is a Python number"),
    *[(MATRIX, {"axis": a}, ValueError, NO_AXIS) for a in (2, -3, (0, 2), (0, -3))],
    ((), {"axis": 0}, ValueError, r"axis 0 is out of range .*shape \(\)"),
    *[
        (MATRIX, {"axis": a}, ValueError, r"axis .* twice.*shape \(3, 4\)")
        for a in ((0, 0), (1, -1), [0, 1, -2])
    ],
    *[(MATRIX, {"axis": a}, TypeError, "axis") for a in ("1", 1.0, (0, None), {0, 1}, object())],
    *[
        (MATRIX, {"layout": layout, "axis": a}, TypeError, "layout or axis, not both")
        for layout in ("o...", "...o", gcx.Layout("o..."))
        for a in (1, ())
    ],
    *[
        ((2, 3, 4), {"layout": text}, ValueError, rf"layout '{text}' .*\(2, 3, 4\)")
        for text in ("oo", "ooo", "oi", "oiii", "o...i...", "xyz", "", "oooi...")
    ],
    *[
        (MATRIX, {"layout": x}, TypeError, f"layout.*{type(x).__name__}")
        for x in (None, 1, ["o", "i"])
    ],
    *[
        (shape, {"strength": x}, ValueError, r"strength .* from 0 to 1")
        for x in STRENGTHS
        for shape in (MATRIX, (3,))
    ],
]


class TestAxes:
    @pytest.mark.parametrize(
        ("shape", "layout", "axes"),
        [
            ((3, 4), "...", (0, 1)),
            ((5,), "i", (0,)),
            ((3, 4, 2, 2), "io...", (0, 2, 3)),
            ((2, 1, 3, 2, 1, 2), "oi...oi", (1, 2, 3, 5)),
            ((2,) * 10, "o...o", tuple(range(1, 9))),
        ],
    )
    def test_layout(
        self, xp: ArrayLibrary, shape: tuple[int, ...], layout: str, axes: tuple[int, ...]
    ) -> None:
        grad = values(*shape)
        expected = centralized(grad, axes)
        for spelled in (layout, gcx.Layout(layout)):
            assert_close(xp, gcx.centralize(xp.asarray(grad), layout=spelled), expected)

    @pytest.mark.parametrize(
        ("axis", "axes"),
        [
            (0, (0,)),
            (1, (1,)),
            (-1, (2,)),
            ((0, 2), (0, 2)),
            ((2, 0), (0, 2)),
            ((2, 1), (1, 2)),
            ((-2, 0), (0, 1)),
            ([-3, 1], (0, 1)),
            (range(1, 3), (1, 2)),
            (np.int64(1), (1,)),
            ((0, 1, 2), (0, 1, 2)),
        ],
    )
    def test_axis(self, xp: ArrayLibrary, axis: Any, axes: tuple[int, ...]) -> None:
        grad = values(3, 4, 2) if axis != 0 else values(5)  # an axis reaches vectors
        assert_close(xp, gcx.centralize(xp.asarray(grad), axis=axis), centralized(grad, axes))

    @pytest.mark.parametrize(("shape", "options", "error", "message"), REFUSED)
    def test_what_does_not_fit(
        self, xp: ArrayLibrary, shape: Any, options: Any, error: Any, message: str
    ) -> None:
        with pytest.raises(error, match=message):
            gcx.centralize(xp.asarray(values(*shape)), **options)

    def test_options_are_named(self, xp: ArrayLibrary) -> None:
        with pytest.raises(TypeError, match="positional"):
            gcx.centralize(xp.asarray(values(3, 4)), "...o")


class TestNothingToCentralize:
    """Subtracting the mean of one number would leave 0, and freeze the weight."""

    @pytest.mark.parametrize(
        ("shape", "options"),
        [
            ((), {}),
            ((5,), {}),
            ((1,), {"layout": "i"}),
            ((5, 1), {}),
            ((1, 5), {"layout": "...o"}),
            ((3, 1, 1, 1), {}),
            ((3, 4, 1), {"axis": -1}),
            ((3, 4), {"axis": ()}),
            ((3, 4), {"axis": []}),
            ((3, 4), {"layout": "o...o"}),
            ((3, 0), {}),
            ((0, 3), {"layout": "...o"}),
            ((3, 0, 2), {}),
        ],
    )
    def test_same_object_comes_back(
        self, xp: ArrayLibrary, shape: tuple[int, ...], options: dict[str, Any]
    ) -> None:
        grad = xp.asarray(values(*shape))
        assert gcx.centralize(grad, **options) is grad

    @pytest.mark.parametrize("shape", [(), (5,), (5, 1)])
    def test_out_gets_a_copy(self, writable: ArrayLibrary, shape: tuple[int, ...]) -> None:
        grad, out = writable.asarray(values(*shape)), writable.asarray(np.zeros(shape))
        assert gcx.centralize(grad, out=out) is out
        np.testing.assert_array_equal(writable.numpy(out), values(*shape))

    @pytest.mark.parametrize(
        ("shape", "axis"),
        [((0, 3), -1), ((0, 2, 2), -1), ((2, 0, 3), -1), ((3, 0), 0), ((65, 0), 0)],
    )  # NumPy cuts the longest columns
    def test_no_output_unit(self, xp: ArrayLibrary, shape: tuple[int, ...], axis: int) -> None:
        assert tuple(gcx.centralize(xp.asarray(values(*shape)), axis=axis).shape) == shape

    def test_out_of_numpy_whose_elements_overlap(self) -> None:
        out = np.lib.stride_tricks.as_strided(np.zeros(10), (3, 4), (8, 8))
        with pytest.raises(TypeError, match="out cannot be written to"):
            gcx.centralize(values(3, 4), out=out)


class TestOutComesWhatWentIn:
    @pytest.mark.parametrize("dtype", WIDE_DTYPES)
    @pytest.mark.parametrize("layout", ["o...", "...o", "io..."])
    def test_wide_dtypes(self, xp: ArrayLibrary, dtype: str, layout: str) -> None:
        numbers = (values(3, 4, 2) + 1j * values(3, 4, 2, seed=1)).astype(np.complex128)
        numbers = (numbers if dtype.startswith("complex") else numbers.real).astype(dtype)
        grad = xp.asarray(numbers, dtype)
        result = gcx.centralize(grad, layout=layout)
        assert_same_kind(result, grad)
        axes = gcx.Layout(layout).fan_in_axes(3)
        assert_close(xp, result, centralized(numbers, axes), float(np.finfo(dtype).eps))

    def test_narrow_dtypes_are_rounded_once(self, xp: ArrayLibrary) -> None:
        # Multiples of 1/4 with a fan-in of 8: every float32 step is exact, so the one rounding is
        # that of the result.
        numbers = np.random.default_rng(0).integers(-15, 16, (16, 8)) / 4
        numbers[:8] += 6
        for dtype in xp.narrow_dtypes:
            grad = xp.asarray(numbers, dtype)
            wide = xp.numpy(grad).astype(np.float32)
            exact = wide - wide.mean(axis=1, keepdims=True)
            assert np.array_equal(exact, centralized(wide, (1,))), "float32 loses nothing here"
            result = gcx.centralize(grad)
            assert_same_kind(result, grad)
            np.testing.assert_array_equal(xp.numpy(result), xp.numpy(xp.asarray(exact, dtype)))

    @pytest.mark.parametrize("layout", ["o...", "...o", "io..."])
    def test_narrow_dtypes_with_strength_and_layout(self, xp: ArrayLibrary, layout: str) -> None:
        axes = gcx.Layout(layout).fan_in_axes(3)
        for dtype in xp.narrow_dtypes:
            grad = xp.asarray(np.random.default_rng(0).integers(-8, 9, (2, 4, 2)), dtype)
            wide = xp.numpy(grad).astype(np.float32)
            exact = wide - 0.5 * wide.mean(axis=axes, keepdims=True)
            result = gcx.centralize(grad, layout=layout, strength=0.5)
            np.testing.assert_array_equal(xp.numpy(result), xp.numpy(xp.asarray(exact, dtype)))

    def test_narrow_dtypes_sum_in_float32(self, xp: ArrayLibrary) -> None:
        # In float16 the sum is 2 * 40000 = inf, in bfloat16 4097 ones add up to 256.
        large, ones = np.full((2, 2), 40000.0), np.ones((1, 4097))
        for dtype in set(xp.narrow_dtypes) & {"float16", "bfloat16"}:
            for numbers in (large, ones):
                result = gcx.centralize(xp.asarray(numbers, dtype))
                np.testing.assert_array_equal(xp.numpy(result).astype(np.float32), 0)

    def test_input_is_left_alone(self, xp: ArrayLibrary) -> None:
        for dtype in (*WIDE_DTYPES, *xp.narrow_dtypes):
            grad = xp.asarray(values(3, 4), dtype)
            before = xp.numpy(grad)
            gcx.centralize(grad)
            np.testing.assert_array_equal(xp.numpy(grad), before)


def assert_same_kind(result: Any, grad: Any) -> None:
    assert type(result) is type(grad)
    for trait in ("shape", "dtype", "device"):
        assert getattr(result, trait, None) == getattr(grad, trait, None)


class TestStrength:
    @pytest.mark.parametrize(
        "strength",
        [0, 0.0, 0.25, 0.3, 1, 1.0, np.float64(0.5), np.float32(0.5), Fraction(1, 2)],
        ids=repr,
    )
    @pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
    def test_part_of_the_mean(self, xp: ArrayLibrary, strength: Any, dtype: str) -> None:
        numbers = values(3, 4).astype(dtype)
        grad = xp.asarray(numbers, dtype)
        wide = numbers.astype(np.result_type(dtype, np.float64))
        expected = wide - float(strength) * (wide - centralized(wide, (1,)))
        result = gcx.centralize(grad, strength=strength)
        assert_same_kind(result, grad)
        assert_close(xp, result, expected, float(np.finfo(dtype).eps))


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
    def test_is_refused_if_immutable(self, immutable: ArrayLibrary, shape: tuple[int, ...]) -> None:
        grad = immutable.asarray(values(*shape))
        with pytest.raises(TypeError, match=r"out cannot be written to.*(immutable|read-only)"):
            gcx.centralize(grad, out=grad)
        np.testing.assert_array_equal(immutable.numpy(grad), values(*shape))

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

    @pytest.mark.parametrize("out", [[[0.0]], "out", 1.0])
    def test_is_an_array(self, xp: ArrayLibrary, out: Any) -> None:
        with pytest.raises(TypeError, match="array"):
            gcx.centralize(xp.asarray(values(1, 2)), out=out)

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

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x[::-1],
            lambda x: x[:, ::-1],
            lambda x: x.T,
            lambda x: x[:],
            lambda x: x.reshape(64, 64),
        ],
        ids=["upside-down", "mirrored", "transposed", "whole", "reshaped"],
    )
    @pytest.mark.parametrize("layout", ["o...", "...o"])
    @pytest.mark.parametrize(
        ("dtype", "reproducible"),
        [
            ("float16", False),
            ("float32", False),
            ("complex64", False),
            ("float16", True),
            ("float32", True),
        ],
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
        memory = values(400_000).astype(np.float32)
        grad = memory[: 64 * 4096].reshape(64, 4096)
        out = memory[shift : shift + grad.size].reshape(grad.shape)
        expected = grad.astype(np.float64)
        expected -= expected.mean(gcx.Layout(layout).fan_in_axes(2), keepdims=True)
        gcx.centralize(grad, layout=layout, out=out, reproducible=reproducible)
        np.testing.assert_allclose(out, expected, rtol=0, atol=4e-6)


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

    @pytest.mark.parametrize(
        "arrange",
        [
            np.asfortranarray,
            lambda x: x[::-1, ::-1],
            lambda x: x[::2, ::3],
            lambda x: np.broadcast_to(x[0], x.shape),
            lambda x: np.broadcast_to(x[:, :1], x.shape),
            lambda x: np.broadcast_to(x[:1, :1], x.shape),
            lambda x: x.astype(x.dtype.newbyteorder()),
            lambda x: np.frombuffer(b"-" + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
        ],
        ids=[
            "fortran",
            "reversed",
            "strided",
            "rows",
            "columns",
            "same",
            "byteswapped",
            "unaligned",
        ],
    )
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


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
class TestNotFinite:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("layout", ["o...", "...o", "oio"])
    @pytest.mark.parametrize("fan_in", [3, 600])
    def test_stays_in_its_own_output_unit(
        self, xp: ArrayLibrary, value: float, layout: str, fan_in: int
    ) -> None:
        shape, place, unit = {
            "o...": ((3, fan_in), (1, 2), (1,)),
            "...o": ((fan_in, 3), (2, 1), (slice(None), 1)),
            "oio": ((2, fan_in, 3), (1, 2, 1), (1, slice(None), 1)),
        }[layout]
        for dtype in ("float32", "float64", "complex64", *xp.narrow_dtypes):
            if np.isinf(value) and dtype == "float8_e4m3fn":
                continue  # it has no infinity
            numbers = values(*shape)
            clean = xp.numpy(gcx.centralize(xp.asarray(numbers, dtype), layout=layout))
            numbers[place] = value
            result = xp.numpy(gcx.centralize(xp.asarray(numbers, dtype), layout=layout))
            assert not np.isfinite(result[unit].astype(np.complex64)).any()
            result[unit] = clean[unit] = 0
            np.testing.assert_array_equal(result, clean)

    @pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
    @pytest.mark.parametrize(("dtype", "large"), [("float32", 3e38), ("float64", 1e308)])
    @pytest.mark.parametrize("layout", ["o...", "...o"])
    def test_a_sum_that_overflows_stays_in_its_own_unit(
        self, xp: ArrayLibrary, dtype: str, large: float, layout: str
    ) -> None:
        numbers = values(3, 40)
        numbers[1] = large
        grad = xp.asarray(numbers if layout == "o..." else numbers.T, dtype)
        result = xp.numpy(gcx.centralize(grad, layout=layout))
        result = result if layout == "o..." else result.T
        others = centralized(numbers[::2].astype(dtype), (1,))
        np.testing.assert_allclose(result[::2], others, rtol=0, atol=1e-5)
        assert not np.isfinite(result[1]).any() or (np.abs(result[1]) <= large * 1e-5).all()


class TestRefused:
    @pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "bool"])
    @pytest.mark.parametrize("shape", [(2, 3), (3,), ()])
    def test_dtypes_that_are_not_floating(
        self, xp: ArrayLibrary, dtype: str, shape: tuple[int, ...]
    ) -> None:
        with pytest.raises(TypeError, match=f"floating dtype, not .*{dtype}; convert the array"):
            gcx.centralize(xp.asarray(np.ones(shape), dtype))

    @pytest.mark.parametrize("dtype", ["O", "U3", "S3", "M8[s]", "m8[s]", "V4", [("a", "f4")]])
    def test_dtypes_of_numpy_alone(self, dtype: Any) -> None:
        with pytest.raises(TypeError, match="floating dtype, not"):
            gcx.centralize(np.zeros((2, 3), dtype))

    @pytest.mark.parametrize(
        "value",
        [[1.0], (1.0,), {"a": 1.0}, "grad", None, 1.0, 1, 1j, object(), range(3), UserList([1.0])],
        ids=lambda value: type(value).__name__,
    )
    def test_what_is_no_array(self, value: object) -> None:
        with pytest.raises(TypeError, match=rf"expected an array.*got .*{type(value).__name__}"):
            gcx.centralize(value)

    @pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
    def test_containers_and_np_matrix_are_sent_elsewhere(self) -> None:
        for value in ([], (), {}):
            with pytest.raises(TypeError, match=r"use gcx.centralize_many"):
                gcx.centralize(value)
        with pytest.raises(TypeError, match=r"np\.matrix .*np\.asarray"):
            gcx.centralize(np.matrix([[1.0, 2.0]]))

    @pytest.mark.parametrize("form", ["coo_array", "csr_array", "csr_matrix", "dia_array"])
    def test_sparse_arrays_of_scipy(self, form: str) -> None:
        sparse = pytest.importorskip("scipy.sparse")
        with pytest.raises(TypeError, match=f"expected an array.*{form}"):
            gcx.centralize(getattr(sparse, form)(np.eye(3)))


def test_a_scale_is_no_gradient(xp: ArrayLibrary) -> None:
    """float8_e8m0fnu has neither sign nor zero, so no difference fits into it."""
    if xp.name in ("strict", "dask", "cupy"):
        pytest.skip("it has no such dtype")
    if xp.backend == "numpy":
        pytest.importorskip("ml_dtypes")
    grad = xp.asarray(np.ones((2, 4), np.float32), "float8_e8m0fnu")
    with pytest.raises(TypeError, match="float8_e8m0fnu"):
        gcx.centralize(grad)
