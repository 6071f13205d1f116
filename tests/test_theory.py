"""P = I - e e^T, and the paper's theorems about it, on every library.

P is an orthogonal projection. Corollary 4.1: the fan-in means of the weights stay as they were,
which fixes the answer of a unit to a shift of its input. Proposition 4.2: the norms of the gradient
and of the Hessian do not grow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gcx

from libraries import ArrayLibrary
from reference import centralized, fan_in_means
from test_optim import FAN_INS, LAYOUTS, OPTIMIZERS, leaves, problem, trained

few_examples = settings(max_examples=25, derandomize=True, deadline=None)
WIDE_DTYPES = ("float32", "float64", "complex64", "complex128")
# Half a unit in the last place of 16.
ROUNDING = {"float16": 2**-7, "bfloat16": 2**-4, "float8_e4m3fn": 0.5, "float8_e5m2": 1}
GAMMA = 0.7


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


@settings(few_examples, max_examples=50)
@given(case=cases(), pick=st.integers(0, 7))
def test_agrees_with_exact_sums(xp: ArrayLibrary, case: Case, pick: int) -> None:
    dtypes = [*WIDE_DTYPES, *xp.narrow_dtypes]
    dtype = dtypes[pick % len(dtypes)]
    # The integers are exact in all dtypes, and differ by 16 at most.
    integers = np.random.default_rng(pick).integers(-8, 9, case.shape)
    for numbers in case.numbers(dtype) if dtype in WIDE_DTYPES else (integers,):
        x = xp.asarray(numbers, dtype)
        result = xp.numpy(gcx.centralize(x, layout=case.layout))
        if case.axes:
            same = xp.numpy(gcx.centralize(x, axis=case.axes))
            np.testing.assert_array_equal(result, same)
        # Two libraries are then within twice of this.
        atol = ROUNDING.get(dtype) or 2 * np.finfo(dtype).eps * np.abs(numbers).max()
        expected = centralized(numbers, case.axes) if case.axes else numbers
        np.testing.assert_allclose(result, expected, rtol=0, atol=atol)


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


@pytest.mark.parametrize("place", [None, "gradient", "update"])
@pytest.mark.parametrize("name", ["momentum-decay", "adam-decay", "adamw-decay"])
def test_training_keeps_the_fan_in_means(xp: Any, name: str, place: Any) -> None:
    """The supplement subtracts the answers the other way round, and forgets the sign."""
    optimizer = replace(OPTIMIZERS[name], where=place, layouts=LAYOUTS if place else "o...")
    params, _ = trained(xp, optimizer, 3 if xp.name == "dask" else 20)
    start, end = leaves(problem(0)[0]), {key: xp.numpy(w) for key, w in leaves(params).items()}
    keeps = place == "update" or (place == "gradient" and name == "momentum-decay")
    for key, axes in FAN_INS.items():
        drift = np.abs(fan_in_means(end[key] - start[key], axes)).max()
        assert drift < 1e-14 if keeps else drift > 1e-3
    x, w = np.random.default_rng(2).uniform(size=(64, 5)), end["dense/kernel"]
    answer = (x + GAMMA) @ w - x @ w
    assert np.allclose(answer, GAMMA * start["dense/kernel"].sum(0), rtol=0, atol=1e-13) is keeps


def test_the_norm_of_the_hessian_falls(xp: Any) -> None:
    hessian = hessian_of_a_network()
    _, fan_in, columns = hessian.shape
    np.testing.assert_allclose(hessian.reshape(columns, -1), hessian.reshape(columns, -1).T)
    projected = xp.numpy(gcx.centralize(xp.asarray(hessian), layout="oio"))

    def largest_singular_value(matrix: Any) -> Any:
        return np.linalg.norm(matrix.reshape(columns, columns), 2)

    assert largest_singular_value(projected) < largest_singular_value(hessian)
    norms, before = [np.sum(matrix**2, axis=(0, 1)) for matrix in (projected, hessian)]
    means = np.sum(fan_in_means(hessian, (1,)) ** 2, axis=(0, 1))
    np.testing.assert_allclose(norms, before - fan_in * means, rtol=0, atol=1e-14 * before.max())
    assert (norms < before).all()


def hessian_of_a_network() -> Any:
    """Hessian in the first weight of two layers: (out, in, one column an element).

    The gradient at ``w + i h v`` has the imaginary part ``h H v``, exact to rounding for small h.
    """
    rng, h = np.random.default_rng(1), 1e-30
    x, target = rng.uniform(0.0, 1.0, (64, 6)), rng.normal(size=64)
    first, second = rng.normal(0.1, 0.4, (5, 6)), rng.normal(size=5)
    hidden = np.tanh(x @ (first + 1j * h * np.eye(30).reshape(30, 5, 6)).swapaxes(1, 2))
    error = (hidden @ second - target) / len(x)
    return np.einsum("vno,ni->oiv", error[..., None] * second * (1 - hidden**2), x).imag / h
