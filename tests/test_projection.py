"""P = I - e e^T as what it is, an orthogonal projection, on gradients of any shape and layout."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gcx

from libraries import ArrayLibrary
from reference import centralized, fan_in_means

few_examples = settings(max_examples=25, derandomize=True, deadline=None)


@dataclass(frozen=True)
class Case:
    """Shape and layout of a weight, and the axes that the layout must mean."""

    shape: tuple[int, ...]
    layout: str
    seed: int

    @property
    def axes(self) -> tuple[int, ...]:
        letters = self.layout.replace("...", "i" * (len(self.shape) - len(self.layout) + 3))
        axes = tuple(k for k, letter in enumerate(letters) if letter == "i")
        is_bias = len(self.shape) == 1 and "o" in self.layout
        fan_in = prod(self.shape[a] for a in axes)
        return () if is_bias or fan_in < 2 else axes

    def numbers(self, dtype: str = "float64") -> tuple[Any, Any]:
        """Two gradients, one of them far from zero."""
        rng = np.random.default_rng(self.seed)
        x, y = rng.standard_normal(self.shape), rng.standard_normal(self.shape) + 100
        if dtype.startswith("complex"):
            x, y = x + 1j * rng.standard_normal(self.shape), y - 1j
        return np.asarray(x, dtype), np.asarray(y, dtype)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    head, tail = draw(st.text("oi", max_size=2)), draw(st.text("oi", max_size=2))
    unnamed = draw(st.integers(0, 2))
    rank = len(head) + unnamed + len(tail)
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=rank, max_size=rank)))
    is_spelled_out = "i" in head + tail and draw(st.booleans())
    middle = "i" * unnamed if is_spelled_out else "..."
    return Case(shape, head + middle + tail, draw(st.integers(0, 99)))


def expected(x: Any, case: Case) -> Any:
    return centralized(x, case.axes) if case.axes else x


@few_examples
@given(case=cases(), dtype=st.sampled_from(["float32", "float64", "complex64", "complex128"]))
def test_agrees_with_exact_sums(xp: ArrayLibrary, case: Case, dtype: str) -> None:
    for numbers in case.numbers(dtype):
        result = gcx.centralize(xp.asarray(numbers, dtype), layout=case.layout)
        if case.axes:
            same = gcx.centralize(xp.asarray(numbers, dtype), axis=case.axes)
            np.testing.assert_array_equal(xp.numpy(result), xp.numpy(same))
        # Two libraries are then within four.
        atol = 2 * np.finfo(dtype).eps * np.abs(numbers).max()
        np.testing.assert_allclose(xp.numpy(result), expected(numbers, case), rtol=0, atol=atol)


@few_examples
@given(case=cases(), pick=st.integers(0, 3))
def test_low_precision_agrees_with_exact_sums(xp: ArrayLibrary, case: Case, pick: int) -> None:
    if not xp.narrow_dtypes:
        pytest.skip("it has no dtype of fewer than 32 bits")
    dtype = xp.narrow_dtypes[pick % len(xp.narrow_dtypes)]
    integers = np.random.default_rng(pick).integers(-8, 9, case.shape)  # exact in all of them
    result = gcx.centralize(xp.asarray(integers, dtype), layout=case.layout)
    # Half a unit in the last place of 16, the largest magnitude that there can be.
    atol = {"float16": 2**-7, "bfloat16": 2**-4, "float8_e4m3fn": 0.5, "float8_e5m2": 1}[dtype]
    np.testing.assert_allclose(xp.numpy(result), expected(integers, case), rtol=0, atol=atol)


@few_examples
@given(case=cases(), dtype=st.sampled_from(["float64", "complex128"]))
def test_is_a_projection(xp: ArrayLibrary, case: Case, dtype: str) -> None:
    """By proposition 4.2, ||P g||^2 = ||g||^2 - M mean^2 for each unit: the norm does not grow."""

    def p(numbers: Any) -> Any:
        return xp.numpy(gcx.centralize(xp.asarray(numbers, dtype), layout=case.layout))

    x, y = case.numbers(dtype)
    px, py = p(x), p(y)
    close = {"rtol": 0, "atol": 1e-10}
    np.testing.assert_allclose(p(2 * x - 3 * y), 2 * px - 3 * py, **close, err_msg="linear")
    np.testing.assert_allclose(np.vdot(px, y), np.vdot(x, py), **close, err_msg="symmetric")
    np.testing.assert_allclose(p(py), py, **close, err_msg="idempotent")
    fan_in = prod(x.shape[a] for a in case.axes)
    for g, pg in ((x, px), (y, py)):
        mean = fan_in_means(g, case.axes) if case.axes else np.zeros(1)
        lost = (np.abs(mean) ** 2).sum(axis=case.axes) * fan_in
        before, after = ((np.abs(v) ** 2).sum(axis=case.axes) for v in (g, pg))
        np.testing.assert_allclose(after, before - lost, rtol=0, atol=1e-9)
        assert np.linalg.norm(pg) <= np.linalg.norm(g) * (1 + 1e-15)
