"""What reproducible=True refuses, by name, and before anything is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gcx


def ones(*shape: int, dtype: str = "float32") -> Any:
    return np.ones(shape, dtype)


class Named(np.ndarray):
    """Might add up as it likes."""


REFUSED = {
    "complex": (
        ones(2, 3, dtype="complex64"),
        "float16, bfloat16, float32, float64, not complex64",
    ),
    "longdouble": (ones(2, 3, dtype="longdouble"), f"not {np.dtype('longdouble').name}"),
    "masked": (np.ma.masked_array(ones(2, 3)), "plain arrays, not MaskedArray; use np.asarray"),
    "subclass": (ones(2, 3).view(Named), "plain arrays, not Named; use np.asarray"),
}


@pytest.mark.parametrize(("grad", "message"), REFUSED.values(), ids=REFUSED)
def test_one_array(grad: Any, message: str) -> None:
    before = grad.copy()
    with pytest.raises(TypeError, match=f"^reproducible=True is for .*{message}"):
        gcx.centralize(grad, out=grad, reproducible=True)
    np.testing.assert_array_equal(grad, before)
    gcx.centralize(grad)  # is another matter


@pytest.mark.parametrize(("grad", "message"), REFUSED.values(), ids=REFUSED)
def test_one_of_many(grad: Any, message: str) -> None:
    good = np.array([[1.0, 3.0]])
    with pytest.raises(TypeError, match=f"^bad: reproducible=True is for .*{message}"):
        gcx.centralize_many(
            {"good": good, "bad": grad}, out={"good": good, "bad": grad}, reproducible=True
        )
    np.testing.assert_array_equal(good, [[1, 3]])


def test_what_is_left_alone_may_be_anything() -> None:
    grads = {"kernel": ones(2, 3), "signal": ones(2, 3, dtype="complex64"), "scale": ones(3, 1)}
    layouts = {"signal": None, "*": "o..."}
    result = gcx.centralize_many(grads, layouts=layouts, reproducible=True)
    assert result["signal"] is grads["signal"]
    assert result["scale"] is grads["scale"]  # a fan-in of one
    np.testing.assert_array_equal(result["kernel"], 0)


def test_a_library_without_a_file_of_its_own() -> None:
    strict = pytest.importorskip("array_api_strict")
    grad = strict.asarray(ones(2, 3))
    with pytest.raises(TypeError, match="NumPy, CuPy, torch and JAX, not array_api_strict"):
        gcx.centralize(grad, reproducible=True)


def test_memmap_is_an_array(tmp_path: Any) -> None:
    grad = np.memmap(tmp_path / "grad", np.float32, "w+", shape=(2, 300))
    grad[:] = np.arange(600.0).reshape(2, 300)
    expected = gcx.centralize(np.array(grad), reproducible=True)
    assert gcx.centralize(grad, out=grad, reproducible=True) is grad
    np.testing.assert_array_equal(grad, expected)


def test_the_buffers_of_numpy_are_left_as_they_are() -> None:
    size = np.getbufsize()
    gcx.centralize(ones(2, 300), reproducible=True)
    assert np.getbufsize() == size
