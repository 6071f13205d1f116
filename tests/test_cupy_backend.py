"""The logic of the CuPy backend where there is no GPU, with NumPy in the place of CuPy.

CuPy computes nothing without a GPU. So this shows that the backend calls CuPy's own operations
rightly, which it does where its kernel is not for (as on ROCm), and nothing about CuPy itself or
its accuracy. The kernel is run in `tests/kernels`. On a machine with a GPU the `xp` fixture runs
all tests on CuPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gcx

import cupy_stand_in
from libraries import ArrayLibrary
from reference import values
from test_centralize import (  # noqa: F401 - run on the library below
    TestAxes,
    TestNotFinite,
    TestNothingToCentralize,
    TestOutComesWhatWentIn,
    TestRefused,
    TestStrength,
)
from test_centralize_memory import TestOut  # noqa: F401 - likewise


def asarray(numbers: Any, dtype: str) -> Any:
    return numbers.astype(dtype).view(cupy_stand_in.Array)


LIBRARIES = [ArrayLibrary("cupy", "cupy", "cpu", asarray, np.asarray)]


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend, with NumPy for CuPy."""
    return cupy_stand_in.install(monkeypatch, cupy_stand_in.StandIn(is_hip=True))


def test_writable(xp: ArrayLibrary, backend: Any) -> None:
    assert backend.is_writable(*[xp.asarray(values(1, 3))] * 2)
    repeated = np.broadcast_to(xp.asarray(values(1, 3)), (2, 3), subok=True)
    assert not backend.is_writable(repeated, repeated)


def test_what_the_kernel_does_not_take_is_not_promised(xp: ArrayLibrary) -> None:
    with pytest.raises(TypeError, match="reproducible=True on CuPy is not for ROCm"):
        gcx.centralize(xp.asarray(values(2, 3)), reproducible=True)


def test_real_cupy_is_imported_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    from gcx import backends

    library = backends.load("cupy")
    assert library.cp is cupy
    assert bool(library.devices()) == cupy.is_available()
