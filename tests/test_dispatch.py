"""From an array to its backend, also for types that gcx has never heard of."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

import gcx
from gcx import _dispatch
from gcx._dispatch import backend_for


@pytest.fixture(autouse=True)
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """No type has been seen before."""
    monkeypatch.setattr(_dispatch, "by_type", {})


def name_of(backend: Any) -> str:
    assert isinstance(backend, ModuleType)
    return backend.__name__.removeprefix("gcx.backends._")


def test_numpy_scalars_are_arrays_of_rank_0_and_text_is_none() -> None:
    assert gcx.centralize(np.float64(2.0)) == 2.0
    with pytest.raises(TypeError, match="not int64; convert the array first"):
        gcx.centralize(np.int64(2))
    for _ in range(2):
        with pytest.raises(TypeError, match="expected an array"):
            backend_for("text")


def test_subclass_of_a_torch_tensor() -> None:
    torch = pytest.importorskip("torch")

    class Mine(torch.Tensor):
        pass

    grad = torch.tensor([[1.0, 3.0]]).as_subclass(Mine)
    assert name_of(backend_for(grad)) == "torch"
    result = gcx.centralize(grad)
    assert type(result) is Mine
    assert result.tolist() == [[-1.0, 1.0]]
    assert name_of(backend_for(torch.nn.Parameter(grad))) == "torch"


class Boxed:
    """An array of a library of its own: it follows the standard, and wraps NumPy to do so."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape, self.dtype, self.device = array.shape, array.dtype, "box"

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return BoxedNamespace()

    def __sub__(self, other: Boxed) -> Boxed:
        return Boxed(self.array - other.array)

    def __add__(self, other: Boxed) -> Boxed:
        return Boxed(self.array + other.array)

    def __rmul__(self, number: float) -> Boxed:
        return Boxed(number * self.array)


class BoxedNamespace:
    __name__ = "boxed"
    float32, float64, complex128 = np.dtype("f4"), np.dtype("f8"), np.dtype("c16")
    isdtype = staticmethod(np.isdtype)
    finfo = staticmethod(np.finfo)

    def astype(self, x: Boxed, dtype: Any) -> Boxed:
        return Boxed(x.array.astype(dtype))

    def mean(self, x: Boxed, *, axis: Any, keepdims: bool) -> Boxed:
        return Boxed(x.array.mean(axis=axis, keepdims=keepdims))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex128"])
def test_any_library_of_the_standard(dtype: str) -> None:
    grad = Boxed(np.array([[1.0, 3.0], [2.0, 6.0]], dtype))
    assert name_of(backend_for(grad)) == "array_api"
    result = gcx.centralize(grad, strength=0.5)
    assert isinstance(result, Boxed)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result.array, [[0, 2], [0, 4]])
    with pytest.raises(TypeError, match="floating dtype, not int64"):
        gcx.centralize(Boxed(np.ones((2, 2), int)))


def test_a_gradient_of_dtype_float0_does_not_turn_numpy_into_jax() -> None:
    jax = pytest.importorskip("jax")
    nothing = np.zeros((2, 3), jax.dtypes.float0)  # what JAX gives for an integer input
    with pytest.raises(TypeError, match="float0"):
        gcx.centralize(nothing)
    assert name_of(backend_for(np.ones((2, 3)))) == "numpy"
