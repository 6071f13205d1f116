"""`gcx.centralize` on every library: what it computes, what it keeps, what it refuses."""

from __future__ import annotations

from collections import UserList
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import gcx

from libraries import ArrayLibrary
from reference import centralized, values

WIDE_DTYPES = ["float32", "float64", "complex64", "complex128"]


def assert_close(xp: ArrayLibrary, result: Any, expected: Any, eps: float = 1e-14) -> None:
    np.testing.assert_allclose(xp.numpy(result), expected, rtol=0, atol=16 * eps)


# Shapes, options that do not fit them, and the error.
MATRIX = (3, 4)
NO_AXIS = r"axis .* out of range or named twice.*shape \(3, 4\)"
AXES = (2, -3, (0, 2), (0, -3), (0, 0), (1, -1), [0, 1, -2])
STRENGTHS = (-0.1, 1.1, float("nan"), "1", None, 1j)
REFUSED: list[tuple[tuple[int, ...], dict[str, Any], type[Exception], str]] = [
    (MATRIX, {"strength": np.array([0.5, 0.5])}, TypeError, "strength is a Python number"),
    *[(MATRIX, {"axis": a}, ValueError, NO_AXIS) for a in AXES],
    ((), {"axis": 0}, ValueError, r"axis 0 is out of range .*shape \(\)"),
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
    (MATRIX, {"layout": None}, TypeError, "layout.*NoneType"),
    *[
        (shape, {"strength": x}, ValueError, r"strength .* from 0 to 1")
        for x in STRENGTHS
        for shape in (MATRIX, (3,))
    ],
]


# Shapes, options, and the fan-in axes that they mean.
FAN_INS: list[tuple[tuple[int, ...], dict[str, Any], tuple[int, ...]]] = [
    ((3, 4), {"layout": "..."}, (0, 1)),
    ((5,), {"layout": "i"}, (0,)),
    ((3, 4, 2, 2), {"layout": gcx.Layout("io...")}, (0, 2, 3)),
    ((2, 1, 3, 2, 1, 2), {"layout": "oi...oi"}, (1, 2, 3, 5)),
    ((2,) * 10, {"layout": "o...o"}, tuple(range(1, 9))),
    ((5,), {"axis": 0}, (0,)),  # an axis reaches vectors
    *[((3, 4, 2), {"axis": axis}, (axis % 3,)) for axis in (1, -1, np.int64(1))],
    *[((3, 4, 2), {"axis": axis}, (0, 1)) for axis in ((-2, 0), [-3, 1], range(2))],
    ((3, 4, 2), {"axis": (2, 0)}, (0, 2)),
    ((3, 4, 2), {"axis": (2, 1)}, (1, 2)),
    ((3, 4, 2), {"axis": (0, 1, 2)}, (0, 1, 2)),
]


class TestAxes:
    @pytest.mark.parametrize(("shape", "options", "axes"), FAN_INS)
    def test_what_fits(self, xp: ArrayLibrary, shape: Any, options: Any, axes: Any) -> None:
        result = gcx.centralize(xp.asarray(values(*shape)), **options)
        assert_close(xp, result, centralized(values(*shape), axes))

    @pytest.mark.parametrize(("shape", "options", "error", "message"), REFUSED)
    def test_what_does_not_fit(
        self, xp: ArrayLibrary, shape: Any, options: Any, error: Any, message: str
    ) -> None:
        with pytest.raises(error, match=message):
            gcx.centralize(xp.asarray(values(*shape)), **options)


class TestNothingToCentralize:
    """Subtracting the mean of one number would leave 0, and freeze the weight."""

    @pytest.mark.parametrize(
        ("shape", "options"),
        [
            *[(shape, {}) for shape in ((), (5,), (5, 1), (3, 1, 1, 1), (3, 0), (3, 0, 2))],
            *[((3, 4), options) for options in ({"axis": ()}, {"axis": []}, {"layout": "o...o"})],
            *[(shape, {"layout": "...o"}) for shape in ((1, 5), (0, 3))],
            ((1,), {"layout": "i"}),
            ((3, 4, 1), {"axis": -1}),
        ],
    )
    def test_same_object_comes_back(self, xp: ArrayLibrary, shape: Any, options: Any) -> None:
        grad = xp.asarray(values(*shape))
        assert gcx.centralize(grad, **options) is grad

    @pytest.mark.parametrize(
        ("shape", "axis"),
        [((0, 3), -1), ((0, 2, 2), -1), ((2, 0, 3), -1), ((3, 0), 0), ((65, 0), 0)],
    )  # NumPy cuts the longest columns
    def test_no_output_unit(self, xp: ArrayLibrary, shape: Any, axis: int) -> None:
        assert tuple(gcx.centralize(xp.asarray(values(*shape)), axis=axis).shape) == shape


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

    @pytest.mark.parametrize("layout", ["o...", "...o", "io..."])
    @pytest.mark.parametrize("strength", [1.0, 0.5])
    def test_narrow_dtypes_are_rounded_once(
        self, xp: ArrayLibrary, strength: float, layout: str
    ) -> None:
        # Multiples of 1/4 with a fan-in of a power of two: every float32 step is exact, so the one
        # rounding is that of the result.
        numbers = np.random.default_rng(0).integers(-15, 16, (8, 4, 8)) / 4
        numbers[:, :2] += 12
        axes = gcx.Layout(layout).fan_in_axes(3)
        for dtype in xp.narrow_dtypes:
            grad = xp.asarray(numbers, dtype)
            wide = xp.numpy(grad).astype(np.float32)
            exact = wide - np.float32(strength) * wide.mean(axis=axes, keepdims=True)
            result = gcx.centralize(grad, layout=layout, strength=strength)
            assert_same_kind(result, grad)
            np.testing.assert_array_equal(xp.numpy(result), xp.numpy(xp.asarray(exact, dtype)))

    def test_narrow_dtypes_sum_in_float32(self, xp: ArrayLibrary) -> None:
        # In float16 the sum is 2 * 40000 = inf, in bfloat16 4097 ones add up to 256.
        large, ones = np.full((2, 2), 40000.0), np.ones((1, 4097))
        for dtype in set(xp.narrow_dtypes) & {"float16", "bfloat16"}:
            for numbers in (large, ones):
                result = gcx.centralize(xp.asarray(numbers, dtype))
                np.testing.assert_array_equal(xp.numpy(result).astype(np.float32), 0)


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
    def test_dtypes_that_are_not_floating(self, xp: ArrayLibrary, dtype: str, shape: Any) -> None:
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
        elsewhere = ".*use gcx.centralize_many" * (type(value) in (list, tuple, dict))
        kind = type(value).__name__
        with pytest.raises(TypeError, match=f"expected an array.*got .*{kind}{elsewhere}"):
            gcx.centralize(value)

    @pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
    def test_np_matrix_is_sent_elsewhere(self) -> None:
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
