"""Means of a weight that are held over a step and restored, in every library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gcx._means import fan_in_mean, restore_mean, subtract_mean
from gcx.layout import Layout

import canonical_order
from libraries import ArrayLibrary, installed
from reference import fan_in_means, values
from same_bits import assert_same_bits, promises_bits

# A layout, a shape, the shape with split axes, and the fan-in axes of that.
CASES = [
    (Layout("o..."), (4, 3, 5), (4, 3, 5), (1, 2)),
    (Layout("...o"), (6, 5), (6, 5), (0,)),
    (Layout("(bi)o", b=2), (6, 5), (2, 3, 5), (1,)),
]


def before_and_after(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return values(*shape), values(*shape, seed=1) + 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]))
@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_means_go_back_by_the_strength(xp: ArrayLibrary, case: Any, strength: float) -> None:
    layout, shape, view, axes = case
    before, after = before_and_after(shape)
    mean = fan_in_mean(xp.asarray(before), layout)
    found = restore_mean(xp.asarray(after), mean, layout, strength=strength)
    moved = fan_in_means(after.reshape(view), axes) - fan_in_means(before.reshape(view), axes)
    expected = (after.reshape(view) - strength * moved).reshape(shape)
    np.testing.assert_allclose(xp.numpy(found), expected, rtol=0, atol=1e-12)
    gone = subtract_mean(xp.asarray(before), mean, layout)
    assert np.abs(fan_in_means(xp.numpy(gone).reshape(view), axes)).max() < 1e-12


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]))
def test_narrow_weights_have_wide_means(xp: ArrayLibrary, case: Any) -> None:
    layout, shape, view, axes = case
    for dtype in set(xp.narrow_dtypes) & {"float16", "bfloat16"}:
        before, after = (xp.asarray(x, dtype) for x in before_and_after(shape))
        mean = fan_in_mean(before, layout)
        assert str(mean.dtype).rpartition(".")[2] == "float32"
        found = restore_mean(after, mean, layout)
        assert found.dtype == after.dtype
        start, end = (fan_in_means(xp.numpy(x).reshape(view), axes) for x in (before, found))
        np.testing.assert_allclose(end, start, rtol=0, atol=0.02)  # rounded to 8 bits


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_reproducible_bits(xp: ArrayLibrary, dtype: str, strength: float) -> None:
    if not promises_bits(xp):
        pytest.skip("no bits are promised here")
    before, after = (x.astype(dtype) for x in before_and_after((5, 1000)))
    mean = fan_in_mean(xp.asarray(before, dtype), "oi", reproducible=True)
    found = restore_mean(xp.asarray(after, dtype), mean, "oi", strength=strength, reproducible=True)
    assert_same_bits(xp.numpy(found), by_hand(before, after, strength))


@pytest.mark.parametrize("dtype", ["complex64", "float8_e5m2"])
def test_dtypes_without_an_order_are_refused(xp: ArrayLibrary, dtype: str) -> None:
    if promises_bits(xp):
        with pytest.raises(TypeError, match="reproducible"):
            fan_in_mean(xp.asarray(np.ones((2, 3)), dtype), "oi", reproducible=True)


def by_hand(before: Any, after: Any, strength: float) -> Any:
    start, end = (
        np.array([[canonical_order.scaled_mean(row, 1.0)] for row in x]) for x in (before, after)
    )
    return after - after.dtype.type(strength) * (end - start)


@pytest.mark.skipif(not installed("jax"), reason="needs jax")
@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize(("layout", "shape"), [("oi", (5, 1000)), ("io", (7, 300))])
def test_inside_jit(layout: str, shape: Any, strength: float, reproducible: bool) -> None:
    import jax

    @jax.jit
    def step(before: Any, after: Any) -> Any:
        mean = fan_in_mean(before, layout, reproducible=reproducible)
        return restore_mean(after, mean, layout, strength=strength, reproducible=reproducible)

    before, after = (x.astype("float32") for x in before_and_after(shape))
    turn = np.transpose if layout == "io" else np.asarray
    found, expected = step(before, after), turn(by_hand(turn(before), turn(after), strength))
    if reproducible:
        assert_same_bits(np.array(found), expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
