"""The only file that imports array_api_compat."""

from array_api_compat import (
    array_namespace,
    is_array_api_obj,
    is_cupy_array,
    is_jax_array,
    is_pydata_sparse_array,
    is_torch_array,
    is_writeable_array,
)

__all__ = [
    "array_namespace",
    "is_array_api_obj",
    "is_cupy_array",
    "is_jax_array",
    "is_pydata_sparse_array",
    "is_torch_array",
    "is_writeable_array",
]
