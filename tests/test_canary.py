"""Green must mean that the libraries and packages which the run asked for did run."""

from __future__ import annotations

from importlib import import_module

import numpy as np

import gcx
from gcx._dispatch import backend_for

import libraries


def test_requested_library_runs(backend_name: str) -> None:
    found = libraries.MAKERS[backend_name]()  # an ImportError here is the point
    assert found, f"{backend_name} was asked for, and has no device on this machine"
    for library in found:
        grad = library.asarray([[1.0, 3.0], [2.0, 6.0]], "float32")
        assert backend_for(grad).__name__ == f"gcx.backends._{library.backend}"
        np.testing.assert_array_equal(library.numpy(gcx.centralize(grad)), [[-1, 1], [-2, 2]])


def test_requested_package_is_there(package_name: str) -> None:
    import_module(package_name)
