"""reproducible=True: the bits of the canonical order, which a plain loop in NumPy gives too."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pytest

import gcx
from gcx import _compat

import canonical_order
from canonical_order import DTYPES, SEGMENT
from libraries import ArrayLibrary
from same_bits import assert_same_bits, promises_bits

# Of numbers that are infinite or none.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

Shape = tuple[int, ...]


def many_magnitudes(rng: np.random.Generator, shape: Shape, axes: Shape) -> Any:
    """As far apart as float16 allows."""
    return rng.normal(size=shape) * np.exp2(rng.integers(-10, 10, shape))


def close_to_the_mean(rng: np.random.Generator, shape: Shape, axes: Shape) -> Any:
    """Many magnitudes, and in between their mean, of which the last bits alone are left over."""
    x = many_magnitudes(rng, shape, axes)
    is_mean = rng.random(shape) < 0.2
    others = np.maximum(np.sum(~is_mean, axis=axes, keepdims=True), 1)
    return np.where(is_mean, np.sum(x, axis=axes, keepdims=True, where=~is_mean) / others, x)


def with_specials(rng: np.random.Generator, shape: Shape, axes: Shape) -> Any:
    """Zeros, infinities and NaN, in some units and not in others."""
    specials = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0], size=shape)
    return np.where(rng.random(shape) < 0.01, specials, rng.normal(size=shape))


TELLING = "close to the mean"
VALUES: dict[str, Callable[[np.random.Generator, Shape, Shape], Any]] = {
    "around zero": lambda rng, shape, axes: rng.normal(size=shape),
    "far from zero": lambda rng, shape, axes: 1.7 + 1e-3 * rng.normal(size=shape),
    "many magnitudes": many_magnitudes,
    TELLING: close_to_the_mean,
    "zeros of both signs": lambda rng, shape, axes: np.copysign(0.0, rng.normal(size=shape)),
    "negative zeros": lambda rng, shape, axes: np.full(shape, -0.0),
    "infinity and NaN": with_specials,
}


class Sample(NamedTuple):
    """A gradient that the dtype holds, and its bits after centralization."""

    grad: Any
    centralized: Any


@cache
def sample(
    shape: Shape, axes: Shape, dtype: str, values: str = TELLING, strength: float = 1.0
) -> Sample:
    drawn = VALUES[values](np.random.default_rng(0), shape, axes)
    grad = canonical_order.rounded(drawn.astype(canonical_order.working_dtype(dtype)), dtype)
    return Sample(grad, canonical_order.centralized(grad, axes, dtype, strength))


def test_canonical_order_is_that_of_the_documentation() -> None:
    one, tiny = np.float32(1), np.float32(2**-25)
    halves = np.array([one, tiny, -one, tiny])
    assert canonical_order.canonical_sum(halves) == 2 * tiny  # (1 - 1) + (tiny + tiny)
    assert sum(halves, start=np.float32(0)) == tiny  # ((1 + tiny) - 1) + tiny

    # Of three elements, padded to four, the last is the partner of the first.
    assert canonical_order.canonical_sum(np.array([one, tiny, -one])) == tiny

    # What is small is lost against the first segment, and not gathered from the others before.
    segments = np.zeros(3 * SEGMENT, np.float32)
    segments[::SEGMENT] = one, tiny, tiny
    assert canonical_order.canonical_sum(segments) == one


def test_bfloat16_is_rounded_as_by_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    x = np.ldexp(rng.normal(size=100_000), rng.integers(-140, 120, 100_000)).astype("float32")
    x = np.append(x, np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 3.4e38], "float32"))
    narrow = x.astype(ml_dtypes.bfloat16).astype("float32")
    assert_same_bits(canonical_order.rounded(x, "bfloat16"), narrow)


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_order_has_other_bits(dtype: str) -> None:
    """Or equal bits would say nothing of the order."""
    for shape, axis in [((33, 300), 1), ((300, 33), 0), ((5, 150_528), 1)]:
        grad, expected = sample(shape, (axis,), dtype)
        other = canonical_order.rounded(grad - np.mean(grad, axis=axis, keepdims=True), dtype)
        with pytest.raises(AssertionError, match="differ"):
            assert_same_bits(other, expected)


def assert_bits(xp: ArrayLibrary, grad: Any, expected: Any, **options: Any) -> None:
    """Equal bits where they are promised, a refusal where they are not."""
    if promises_bits(xp):
        result = gcx.centralize(grad, reproducible=True, **options)
        assert result.dtype == grad.dtype
        assert_same_bits(xp.numpy(result), expected)
    else:
        with pytest.raises(TypeError, match=r"NumPy, CuPy, torch and JAX, not (array_api_st|dask)"):
            gcx.centralize(grad, reproducible=True, **options)


def dtypes_of(xp: ArrayLibrary) -> list[str]:
    return ["float64", "float32", *(set(xp.narrow_dtypes) & set(DTYPES))]


@pytest.mark.parametrize("values", VALUES)
def test_all_values(xp: ArrayLibrary, values: str) -> None:
    for dtype in dtypes_of(xp):
        for shape, axis in [((33, 300), 1), ((300, 33), 0)]:
            grad, expected = sample(shape, (axis,), dtype, values)
            assert_bits(xp, xp.asarray(grad, dtype), expected, axis=axis)


# Layout, shape, and the axes that the layout means.
LAYOUTS = [
    ("o...", (33, 300), (1,)),
    ("o...", (8, 3, 5, 5), (1, 2, 3)),
    ("...o", (300, 33), (0,)),
    ("...o", (3, 3, 4, 6), (0, 1, 2)),
    ("io...", (4, 5, 3, 3), (0, 2, 3)),
    ("oio", (3, 40, 5), (1,)),
    ("ioo", (60, 2, 3), (0,)),
    ("iio", (2, 30, 6), (0, 1)),
    ("...", (90,), (0,)),
]


@pytest.mark.parametrize(
    ("layout", "shape", "axes"), LAYOUTS, ids=[f"{layout} {shape}" for layout, shape, _ in LAYOUTS]
)
def test_all_layouts(xp: ArrayLibrary, layout: str, shape: Shape, axes: Shape) -> None:
    for dtype in dtypes_of(xp):
        grad, expected = sample(shape, axes, dtype)
        assert_bits(xp, xp.asarray(grad, dtype), expected, layout=layout)


@pytest.mark.parametrize("axis", [0, 1, 2, (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_all_axes(xp: ArrayLibrary, axis: Any) -> None:
    axes = (axis,) if isinstance(axis, int) else axis
    grad, expected = sample((16, 27, 8), axes, "float32")
    assert_bits(xp, xp.asarray(grad, "float32"), expected, axis=axis)
    # The fan-in has the order of the axes of the array, not that in which they are named.
    assert_bits(xp, xp.asarray(grad, "float32"), expected, axis=[a - 3 for a in reversed(axes)])


FAN_INS = [2, 3, 4, 5, 7, 9, 27, 147, 576, 1000, 4608, 14_336, SEGMENT - 1, SEGMENT, SEGMENT + 1]
FAN_INS += [2 * SEGMENT, 3 * SEGMENT + 5, 150_528, 10**6]


@pytest.mark.parametrize("layout", ["o...", "...o"])
@pytest.mark.parametrize("fan_in", FAN_INS)
def test_all_fan_ins(xp: ArrayLibrary, fan_in: int, layout: str) -> None:
    units = 40 if fan_in < SEGMENT - 1 else 2
    shape, axis = ((units, fan_in), 1) if layout == "o..." else ((fan_in, units), 0)
    # Narrower numbers are summed in float32, whatever the fan-in: for most of them that is enough.
    dtypes = dtypes_of(xp) if fan_in in (27, 1000, 3 * SEGMENT + 5) else ("float64", "float32")
    for dtype in dtypes:
        grad, expected = sample(shape, (axis,), dtype)
        assert_bits(xp, xp.asarray(grad, dtype), expected, layout=layout)


def spread(x: Any) -> Any:
    """Every second row and third column of something larger."""
    larger = np.full((*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1]), 1e3)
    larger[..., ::2, 1::3] = x
    return larger


# The same numbers elsewhere in memory: stored by NumPy, then seen through the library.
VIEWS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "axes in reverse": (np.transpose, lambda lib, x: lib.permute_dims(x, (3, 2, 1, 0))),
    "slices of channels last": (
        lambda x: spread(x.transpose(0, 2, 3, 1)),
        lambda lib, x: lib.permute_dims(x[..., ::2, 1::3], (0, 3, 1, 2)),
    ),
    "backwards": (lambda x: x[:, ::-1, ::-1], lambda lib, x: lib.flip(x, axis=(1, 2))),
}


@pytest.mark.parametrize("layout", ["o...", "io...", "...o"])
@pytest.mark.parametrize("view", VIEWS)
def test_all_strides(xp: ArrayLibrary, view: str, layout: str) -> None:
    store, see = VIEWS[view]
    shape, axes = (16, 8, 5, 7), gcx.Layout(layout).fan_in_axes(4)
    for dtype in dtypes_of(xp):
        grad, expected = sample(shape, axes, dtype)
        stored = xp.asarray(np.ascontiguousarray(store(grad)), dtype)
        seen = see(_compat.array_namespace(stored), stored)
        np.testing.assert_array_equal(xp.numpy(seen), grad)
        assert_bits(xp, seen, expected, layout=layout)


@pytest.mark.parametrize(("shape", "together", "axis"), [((9, 1), (9, 4), 0), ((1, 9), (4, 9), 1)])
def test_one_unit_seen_several_times(
    xp: ArrayLibrary, shape: Any, together: Any, axis: int
) -> None:
    grad, expected = sample(shape, (axis,), "float32")
    stored = xp.asarray(grad, "float32")
    seen = _compat.array_namespace(stored).broadcast_to(stored, together)
    assert_bits(xp, seen, np.broadcast_to(expected, together), axis=axis)


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.5, 0.9])
def test_all_strengths(xp: ArrayLibrary, strength: float) -> None:
    for dtype in dtypes_of(xp):
        for values in (TELLING, "far from zero", "zeros of both signs", "negative zeros"):
            grad, expected = sample((33, 300), (1,), dtype, values, strength)
            assert_bits(xp, xp.asarray(grad, dtype), expected, strength=strength)


@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [("float16", 3e-6), ("bfloat16", 1e-39), ("float32", 1e-39), ("float64", 1e-309)],
)
def test_subnormal_numbers(xp: ArrayLibrary, dtype: str, magnitude: float) -> None:
    """They count, but JAX's compiler takes those of its working dtype for zeros on a CPU."""
    if dtype not in dtypes_of(xp):
        return
    x = magnitude * np.random.default_rng(0).normal(size=(33, 300))
    grad = canonical_order.rounded(x.astype(canonical_order.working_dtype(dtype)), dtype)
    expected = canonical_order.centralized(grad, (1,), dtype)
    assert np.count_nonzero(expected) > 9000
    if xp.backend == "jax" and dtype != "float16":
        expected = 0 * grad
    assert_bits(xp, xp.asarray(grad, dtype), expected)


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "float8_e4m3fn", "float8_e5m2"])
def test_other_dtypes_are_refused(xp: ArrayLibrary, dtype: str) -> None:
    if dtype.startswith("float8") and dtype not in xp.narrow_dtypes:
        return
    grad = xp.asarray(np.ones((3, 4)), dtype)
    named = dtype if promises_bits(xp) else "not"
    with pytest.raises(TypeError, match=f"reproducible=True is for .*{named}"):
        gcx.centralize(grad, reproducible=True)
    gcx.centralize(grad)


@pytest.mark.parametrize("layout", ["o...", "...o"])
def test_in_place(writable: ArrayLibrary, layout: str) -> None:
    xp = writable
    if not promises_bits(xp):
        pytest.skip("no bits are promised here")
    axes = gcx.Layout(layout).fan_in_axes(2)
    for dtype in dtypes_of(xp):
        x, expected = sample((33, 300), axes, dtype)
        grad, out = xp.asarray(x, dtype), xp.asarray(0 * x, dtype)
        assert gcx.centralize(grad, layout=layout, out=out, reproducible=True) is out
        assert_same_bits(xp.numpy(out), expected)
        assert_same_bits(xp.numpy(grad), x)
        assert gcx.centralize(grad, layout=layout, out=grad, reproducible=True) is grad
        assert_same_bits(xp.numpy(grad), expected)


def test_several_at_once(xp: ArrayLibrary) -> None:
    samples = {
        f"{dtype} {layout}": (layout, dtype, sample(shape, axes, dtype))
        for dtype in dtypes_of(xp)
        for layout, shape, axes in LAYOUTS
    }
    grads = {name: xp.asarray(one.grad, dtype) for name, (_, dtype, one) in samples.items()}
    layouts: Any = {name: layout for name, (layout, _, _) in samples.items()}
    bias = xp.asarray(np.ones(3), "float32")
    tree: list[Any] = [grads, bias, None]
    layouts = {**{f"0/{name}": layout for name, layout in layouts.items()}, "*": None}
    centralize_all = partial(gcx.centralize_many, tree, layouts=layouts, reproducible=True)
    if not promises_bits(xp):
        with pytest.raises(TypeError, match=r"0/float64 o.*reproducible"):
            centralize_all()
        return
    assert gcx.centralize(bias, reproducible=True) is bias
    for out in [None, tree] if xp.is_writable else [None]:
        found, same_bias, nothing = centralize_all(out=out)
        assert same_bias is bias
        assert nothing is None
        for name, (_, _, one) in samples.items():
            assert_same_bits(xp.numpy(found[name]), one.centralized)


def ones(*shape: int, dtype: str = "float32") -> Any:
    return np.ones(shape, dtype)


class Named(np.ndarray):
    """Might add up as it likes."""


WIDER = f"{', '.join(DTYPES)}, not {np.dtype('longdouble').name}"
PLAIN = "plain arrays, not {}; use np.asarray"
REFUSED = {
    "longdouble": (ones(2, 3, dtype="longdouble"), WIDER),
    "masked": (np.ma.masked_array(ones(2, 3)), PLAIN.format("MaskedArray")),
    "subclass": (ones(2, 3).view(Named), PLAIN.format("Named")),
}


@pytest.mark.parametrize(("grad", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_comes_before_anything_is_written(grad: Any, message: str) -> None:
    grads = [ones(2, 3) * [1, 2, 6], grad]
    with pytest.raises(TypeError, match=f"^1: reproducible=True is for .*{message}"):
        gcx.centralize_many(grads, out=grads, reproducible=True)
    assert grads[0].tolist() == [[1, 2, 6]] * 2
    gcx.centralize(grad)  # is another matter


def test_what_is_left_alone_may_be_anything() -> None:
    signal, scale = ones(2, 3, dtype="complex64"), ones(3, 1, dtype="complex64")
    grads = {"kernel": ones(2, 3), "signal": signal, "scale": scale}
    layouts = {"signal": None, "*": "o..."}
    result = gcx.centralize_many(grads, layouts=layouts, reproducible=True)
    assert result["signal"] is grads["signal"]
    assert result["scale"] is grads["scale"]  # a fan-in of one
    np.testing.assert_array_equal(result["kernel"], 0)


def test_memmap_is_an_array(tmp_path: Any) -> None:
    grad = np.memmap(tmp_path / "grad", np.float32, "w+", shape=(2, 300))
    grad[:] = np.arange(600.0).reshape(2, 300)
    expected = gcx.centralize(np.array(grad), reproducible=True)
    assert gcx.centralize(grad, out=grad, reproducible=True) is grad
    np.testing.assert_array_equal(grad, expected)


@pytest.mark.parametrize("layout", ["oi", "io"])
@pytest.mark.parametrize("reproducible", [True, False])
def test_the_buffers_of_numpy_are_left_as_they_are(layout: str, reproducible: bool) -> None:
    before = np.getbufsize(), np.geterr()
    gcx.centralize(ones(200, 300), layout=layout, reproducible=reproducible)
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        gcx.centralize(ones(200, 300) * 3e38, layout=layout, reproducible=reproducible)
    assert (np.getbufsize(), np.geterr()) == before
