"""`gcx.testing.assert_centralized`: it lets through what is centralized, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gcx
from gcx.testing import assert_centralized

from libraries import ArrayLibrary
from reference import values
from test_centralize import WIDE_DTYPES

# Bits behind the leading one.
BITS = {"float16": 10, "complex32": 10, "bfloat16": 7, "float8_e4m3fn": 3, "float8_e5m2": 2}


@pytest.mark.parametrize(
    "options", [{}, {"layout": "...o"}, {"layout": "io..."}, {"axis": (0, -1)}, {"axis": 1}]
)
def test_what_gcx_centralized_passes(xp: ArrayLibrary, options: dict[str, Any]) -> None:
    for dtype in WIDE_DTYPES if not options else ["float64"]:
        grad = xp.asarray(values(3, 4, 5), dtype)
        assert_centralized(gcx.centralize(grad, **options), **options)
        with pytest.raises(AssertionError, match="not centralized: a mean over axes"):
            assert_centralized(grad, **options)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_low_precision_needs_a_tolerance(xp: ArrayLibrary) -> None:
    """64 epsilons of bfloat16 are 0.5: a default that would let through most of a mean."""
    for dtype in (*xp.narrow_dtypes, *["complex32"] * (xp.name == "torch")):
        grad = xp.asarray(values(3, 16) * (1j if dtype == "complex32" else 1), dtype)
        rtol = 2.0 ** -BITS[dtype]
        assert_centralized(gcx.centralize(grad), rtol=rtol)
        with pytest.raises(AssertionError, match="not centralized"):
            assert_centralized(grad, rtol=rtol)
        with pytest.raises(ValueError, match=f"rtol.*{dtype}"):
            assert_centralized(gcx.centralize(grad))


def test_what_is_not_hidden(xp: ArrayLibrary) -> None:
    result = gcx.centralize(xp.asarray(values(3, 4)), layout="...o")
    with pytest.raises(AssertionError, match=r"a mean over axes \(1,\) is 0\.\d+ of the largest"):
        assert_centralized(result, layout="o...")
    numbers = values(1000, 8)
    numbers -= numbers.mean(1, keepdims=True)
    assert_centralized(xp.asarray(numbers))
    numbers[777] += 1e-9
    with pytest.raises(AssertionError):
        assert_centralized(xp.asarray(numbers))
    with pytest.raises(AssertionError, match="is 1 of the largest magnitude"):
        assert_centralized(xp.asarray([[1e20, -1e20], [1e-20, 1e-20]]))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_fails(xp: ArrayLibrary, value: float) -> None:
    for numbers in ([[value, 0.0], [1.0, -1.0]], [[1.0, -1.0], [value, value]]):
        with pytest.raises(AssertionError, match="nan"):
            assert_centralized(xp.asarray(numbers))


def test_rtol(xp: ArrayLibrary) -> None:
    assert_centralized(xp.asarray(np.zeros((3, 4))))
    x = xp.asarray([[1.0, -0.5]])
    assert_centralized(x, rtol=0.25)  # a mean as large as that
    with pytest.raises(AssertionError, match=r"more than 0.24"):
        assert_centralized(x, rtol=0.24)


@pytest.mark.parametrize("dtype", WIDE_DTYPES)
def test_the_default_is_64_roundings(xp: ArrayLibrary, dtype: str) -> None:
    epsilon = float(np.finfo(dtype).eps)
    for sign in (1, -1):
        assert_centralized(xp.asarray([[1.0, -1.0 + sign * 126 * epsilon]], dtype))
        with pytest.raises(AssertionError, match=f"more than {64 * epsilon:.3g}$"):
            assert_centralized(xp.asarray([[1.0, -1.0 + sign * 132 * epsilon]], dtype))


@pytest.mark.parametrize("shape", [(), (3,), (3, 1), (3, 0), (0, 3)])
def test_nothing_to_check_is_an_error(xp: ArrayLibrary, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"nothing to check.*shape \("):
        assert_centralized(xp.asarray(values(*shape)))


def test_arguments_are_those_of_centralize(xp: ArrayLibrary) -> None:
    with pytest.raises(TypeError, match="layout or axis, not both"):
        assert_centralized(xp.asarray(np.zeros((3, 4))), axis=1, layout="...o")
    with pytest.raises(TypeError, match=r"not .*int64"):
        assert_centralized(xp.asarray(np.zeros((3, 4)), "int64"))


@pytest.mark.parametrize("rate", [1e-4, 1e6])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding_is_that_of_the_larger_weights(xp: ArrayLibrary, dtype: str, rate: float) -> None:
    """In a small step it is large beside their change."""
    start, grad = (xp.asarray(values(8, 64, seed=seed), dtype) for seed in (0, 1))
    moved = start - rate * gcx.centralize(grad)
    assert_centralized(moved, start=start)
    assert_centralized(start, start=moved)
    with pytest.raises(
        AssertionError, match=r"the change of a mean over axes .* With Adam .*p\.grad"
    ):
        assert_centralized(start - rate * grad, start=start)


def test_start_is_of_other_weights_of_the_same_shape(xp: ArrayLibrary) -> None:
    weights = xp.asarray(values(3, 4))
    with pytest.raises(AssertionError, match="nothing was trained"):
        assert_centralized(weights, start=weights)
    with pytest.raises(ValueError, match=r"start has shape \(4, 3\), the weight \(3, 4\)"):
        assert_centralized(weights, start=xp.asarray(values(4, 3)))


def test_the_change_of_a_torch_parameter() -> None:
    """As in training: the weights carry a graph, and there is no warning for it."""
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [0.0, 4.0]]))
    assert_centralized(weight - torch.tensor([[0.0, 3.0], [1.0, 3.0]]))
    with pytest.raises(AssertionError):
        assert_centralized(weight - torch.tensor([[0.0, 3.0], [1.0, 2.0]]))
