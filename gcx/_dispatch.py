"""The backend of an array."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

from gcx._frameworks import describe
from gcx.backends import Backend
from gcx.layout import Layout
from gcx.plan import Plan

ArrayT = TypeVar("ArrayT")

# A cache: `_find` would find the same backends again. Enter a backend from outside of gcx here.
by_type: dict[type, Backend] = {}


def backend_for(array: Any) -> Backend:
    """Find the backend of an array by its type, without importing another library."""
    try:
        return by_type[type(array)]
    except KeyError:
        backend: Backend = _find(array)
        by_type[type(array)] = backend
        return backend


def reshape(array: ArrayT, shape: tuple[int, ...]) -> ArrayT:
    """Split or join neighbouring axes."""
    if hasattr(array, "reshape"):
        return array.reshape(shape)  # type: ignore[no-any-return]
    from gcx import _compat

    return _compat.array_namespace(array).reshape(array, shape)  # type: ignore[no-any-return]


def find_call(grads: Any, layouts: object, out: Any, reproducible: bool) -> Any:
    """Find the object that repeats a call with a list; None if this can be no repeat."""
    is_plain = (out is None or out is grads) and isinstance(layouts, (str, Layout, Plan))
    if type(grads) is not list or not grads or not is_plain:
        return None
    backend: Any = by_type.get(type(grads[0]))
    is_repeatable = getattr(backend, "is_repeatable", None)
    if is_repeatable is None or not is_repeatable(grads[0]):
        return None
    from gcx.backends import _torch_cuda

    return _torch_cuda.Call(backend.centralize, grads, layouts, out is not None, reproducible)


def _find(array: Any) -> Any:
    # torch.compile traces this function and must find the origin of each module. It can do so with
    # `from ... import` in branches, but not with a loop or typing.cast (hence the return type Any).
    # torch comes first, without array_api_compat, since its caches make torch.compile warn.
    if "torch" in sys.modules:
        from torch import Tensor

        if isinstance(array, Tensor):
            from gcx.backends import _torch

            return _torch
    if "numpy" in sys.modules:
        from numpy import generic, ndarray

        # array_api_compat would take an ndarray of JAX's dtype float0 for a JAX array.
        if isinstance(array, (ndarray, generic)):
            from gcx.backends import _numpy

            return _numpy
    from gcx import _compat

    if _compat.is_jax_array(array):
        from gcx.backends import _jax

        return _jax
    if _compat.is_cupy_array(array):
        from gcx.backends import _cupy

        return _cupy
    if _compat.is_array_api_obj(array):
        from gcx.backends import _array_api

        return _array_api
    is_tree = isinstance(array, (list, tuple, dict))
    hint = "; make it an array, or use gcx.centralize_many for several" if is_tree else ""
    raise TypeError(
        f"expected an array (NumPy, CuPy, torch, JAX, or any library of the array API standard), "
        f"got {describe(array)}{hint}"
    )
