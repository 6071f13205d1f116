"""Run a model on shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def shapes_of(function: Callable[..., Any], inputs: Any, keyword_inputs: Any) -> Any:
    """Shapes of what ``function(*inputs, **keyword_inputs)`` returns, with nothing computed.

    Arrays and `jax.ShapeDtypeStruct` are traced; everything else, such as ``train=True``, is passed
    as it is.
    """
    leaves, structure = jax.tree.flatten((inputs, keyword_inputs))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def of_arrays(*arrays: Any) -> Any:
        traced = iter(arrays)
        mixed = [next(traced) if k else leaf for k, leaf in zip(is_array, leaves, strict=True)]
        inputs, keyword_inputs = jax.tree.unflatten(structure, mixed)
        return function(*inputs, **keyword_inputs)

    arrays = [leaf for k, leaf in zip(is_array, leaves, strict=True) if k]
    return jax.eval_shape(of_arrays, *arrays)
