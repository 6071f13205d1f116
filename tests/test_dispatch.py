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
    for value, message in ((np.int64(2), "not int64; convert"), ("text", "expected an array")):
        for _ in range(2):
            with pytest.raises(TypeError, match=message):
                gcx.centralize(value)


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


def test_a_gradient_of_dtype_float0_does_not_turn_numpy_into_jax() -> None:
    jax = pytest.importorskip("jax")
    nothing = np.zeros((2, 3), jax.dtypes.float0)  # what JAX gives for an integer input
    with pytest.raises(TypeError, match="float0"):
        gcx.centralize(nothing)
    assert name_of(backend_for(np.ones((2, 3)))) == "numpy"
