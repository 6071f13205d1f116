"""How far float32 is from exact, in units in the last place (ulp) of the largest magnitude."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest

import gcx

from libraries import ArrayLibrary
from reference import centralized
from test_centralize_memory import ARRANGED

# Fan-in, number of output units and error allowed. 4608 is a 3x3 convolution on 512 channels,
# 150528 an image of 224x224x3; the others lie at the ends of the blocks that backends work in.
SIZES = [(2, 8, 4), (127, 40, 4), (4097, 40, 4), (4608, 32, 4), (8192, 16, 4)]
SIZES += [(150_528, 4, 4), (1_000_000, 2, 16)]

ROWS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Any]] = {
    "zero mean": lambda rng, shape: rng.standard_normal(shape),
    "mean 1e4, spread 1": lambda rng, shape: 1e4 + rng.standard_normal(shape),
}

# The same output units in other places of the array.
PLACES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "trailing": ("o...", lambda rows: rows),
    "leading": ("...o", lambda rows: rows.T),
    "both ends": ("io...", lambda rows: rows.reshape(len(rows), *halves(rows)).transpose(1, 0, 2)),
    "ends": ("ioi", lambda rows: rows.reshape(len(rows), *halves(rows)[::-1]).transpose(1, 0, 2)),
    "middle": ("oio", lambda rows: rows.reshape(2, len(rows) // 2, -1).transpose(0, 2, 1)),
}


def halves(rows: Any) -> tuple[int, int]:
    fan_in = rows.shape[1]
    first = next(n for n in (2, 7, 17, 1) if fan_in % n == 0)
    return first, fan_in // first


@cache
def rows_and_exact(kind: str, fan_in: int, units: int) -> tuple[Any, Any]:
    rows = ROWS[kind](np.random.default_rng(fan_in), (units, fan_in)).astype(np.float32)
    return rows, centralized(rows, (1,))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ROWS)
def test_float32(xp: ArrayLibrary, kind: str, place: str, size: tuple[int, int, int]) -> None:
    fan_in, units, allowed = size
    layout, put = PLACES[place]
    rows, exact = rows_and_exact(kind, fan_in, units)
    ulp = np.spacing(np.abs(rows).max(axis=1, keepdims=True))
    grad = xp.asarray(np.ascontiguousarray(put(rows)), "float32")
    error = np.abs(xp.numpy(gcx.centralize(grad, layout=layout)) - put(exact))
    assert (error / put(np.broadcast_to(ulp, rows.shape))).max() <= allowed


@pytest.mark.parametrize("dtype", ["float64", "complex64", "complex128"])
def test_long_sums_in_other_dtypes(xp: ArrayLibrary, dtype: str) -> None:
    rows = np.random.default_rng(0).normal(0.5, 1.0, (3, 5000)).astype(dtype)
    result = xp.numpy(gcx.centralize(xp.asarray(rows, dtype)))
    atol = 2 * np.finfo(dtype).eps * np.abs(rows).max()
    np.testing.assert_allclose(result, centralized(rows, (1,)), rtol=0, atol=atol)


# JAX adds few long rows in another order.
MANY = [(n, 34) for n in (9, 128, 512, 1000, 4097, 8192, 69_632)]
FEW = [(1020, 4), (1955, 2), (3844, 2)]


@pytest.mark.parametrize(("fan_in", "n_units"), MANY + FEW)
@pytest.mark.parametrize("place", PLACES)
def test_equal_numbers(xp: ArrayLibrary, fan_in: int, n_units: int, place: str) -> None:
    """Where rounding is at its worst: each addition of a sum errs in the same direction."""
    layout, put = PLACES[place]
    units = np.random.default_rng(0).uniform(1e4, 1.6e4, n_units).astype(np.float32)
    grad = np.ascontiguousarray(put(np.repeat(units[:, None], fan_in, axis=1)))
    result = xp.numpy(gcx.centralize(xp.asarray(grad, "float32"), layout=layout))
    assert np.abs(result).max() <= 8 * np.spacing(units[0])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("arranged", ["spread", "fortran", "reversed", "byteswapped", "unaligned"])
def test_numpy_memory(arranged: str, kind: str, place: str) -> None:
    layout, put = PLACES[place]
    rows, exact = rows_and_exact(kind, 4608, 32)
    grad, wanted = (ARRANGED[arranged](np.ascontiguousarray(put(x))) for x in (rows, exact))
    ulp = np.spacing(np.abs(rows).max())
    assert (np.abs(gcx.centralize(grad, layout=layout) - wanted) / ulp).max() <= 4


@pytest.mark.parametrize("fan_in", [1025, 9001])
def test_numpy_float64_in_any_order_of_memory(fan_in: int) -> None:
    rows = np.random.default_rng(0).normal(3, 1, (16, fan_in))
    exact, ulp = centralized(rows, (1,)), np.spacing(np.abs(rows).max())
    for grad in (rows, np.asfortranarray(rows), np.repeat(rows, 2, axis=1)[:, ::2]):
        assert (np.abs(gcx.centralize(grad) - exact) / ulp).max() <= 4


@pytest.mark.parametrize("byte_order", "<>")
def test_numpy_float64_of_equal_numbers(byte_order: str) -> None:
    grad = np.full((100_000, 6), 0.1, byte_order + "f8")
    for x in (grad, grad[:, ::2], grad[:1000], grad[:, :1]):
        assert np.abs(gcx.centralize(x, layout="...o")).max() <= 8 * np.spacing(0.1)


@pytest.mark.parametrize("layout", ["o...", "...o"])
def test_units_of_every_size(xp: ArrayLibrary, layout: str) -> None:
    """Each unit has its own scale: a large one beside it must not cost a small one its digits."""
    rows = np.random.default_rng(0).normal(loc=1.0, size=(30, 500))
    rows = (rows * np.logspace(-20, 20, 30)[:, None]).astype(np.float32)
    grad = rows if layout == "o..." else rows.T
    result = xp.numpy(gcx.centralize(xp.asarray(grad, "float32"), layout=layout))
    error = np.abs((result if layout == "o..." else result.T) - centralized(rows, (1,)))
    assert (error / np.spacing(np.abs(rows).max(axis=1, keepdims=True))).max() <= 4


# In a sum of the array's own dtype the large number swallows the small ones, in any order. A wider
# sum, or one that corrects its rounding, keeps them.
LOSSY = {"float32": [2.0**24, 0.3, 0.3, 0.3, 0.05], "float64": [2.0**53, 0.5, 0.45]}


def lossy_rows(dtype: str) -> Any:
    return np.stack([np.array(LOSSY[dtype], dtype)] * 6)


def swallows(grad: Any, **options: Any) -> bool:
    """Tell from the result whether the sums lost the small numbers, as sums by BLAS do."""
    dtype, numbers = grad.dtype.type, LOSSY[grad.dtype.name]
    large = grad == numbers[0]
    lossy = dtype(numbers[0]) - dtype(numbers[0] / len(numbers))
    exact = dtype(numbers[0]) - dtype(sum(map(Fraction, numbers)) / len(numbers))
    found = {float(x) for x in gcx.centralize(grad, **options)[large]}
    assert lossy != exact, "the numbers tell nothing"
    assert found in ({float(lossy)}, {float(exact)})
    return found == {float(lossy)}


@pytest.mark.parametrize("dtype", LOSSY)
def test_numpy_sums_by_blas_where_memory_is_a_matrix(dtype: str) -> None:
    rows = lossy_rows(dtype)
    columns = np.ascontiguousarray(rows.T)
    assert swallows(rows)
    assert swallows(rows.reshape(2, 3, -1), layout="ooi")
    assert swallows(columns, layout="...o")
    assert swallows(columns.reshape(-1, 2, 3), layout="ioo")
    assert swallows(rows, out=np.empty_like(rows))
    assert swallows(columns, out=columns, layout="...o")


@pytest.mark.parametrize("dtype", LOSSY)
def test_numpy_sums_exactly_where_memory_is_no_matrix(dtype: str) -> None:
    rows = lossy_rows(dtype)
    columns = np.ascontiguousarray(rows.T)
    assert not swallows(rows.T, layout="...o")
    assert not swallows(np.repeat(rows, 2, axis=1)[:, ::2])
    assert not swallows(np.stack([columns, columns]), layout="oio")
    assert not swallows(rows, out=np.empty_like(columns).T)
    assert not swallows(rows.view(Marked))


class Marked(np.ndarray):
    """A subclass may do anything in its own methods."""


@pytest.mark.parametrize("layout", ["o...", "...o", "ioi"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_large_narrow_tensors_of_torch(layout: str, order: tuple[int, ...]) -> None:
    """They are cut into blocks; every number is exact until the last rounding."""
    torch = pytest.importorskip("torch")
    integers = np.random.default_rng(0).integers(-8, 9, (128, 64, 64))
    x = torch.from_numpy(integers).bfloat16().permute(order)
    expected = gcx.centralize(x.double(), layout=layout).bfloat16()
    half = gcx.centralize(x.double(), layout=layout, strength=0.5).bfloat16()
    with torch.device("meta"):  # the default, which has no say here
        assert torch.equal(gcx.centralize(x, layout=layout), expected)
    assert torch.equal(gcx.centralize(x, layout=layout, strength=0.5), half)
    assert torch.equal(gcx.centralize(x, layout=layout, out=x), expected)
