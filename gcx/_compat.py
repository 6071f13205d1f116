"""The only file that imports array_api_compat."""

import array_api_compat

array_namespace = array_api_compat.array_namespace
is_array_api_obj = array_api_compat.is_array_api_obj
is_cupy_array = array_api_compat.is_cupy_array
is_jax_array = array_api_compat.is_jax_array
is_pydata_sparse_array = array_api_compat.is_pydata_sparse_array
is_torch_array = array_api_compat.is_torch_array
is_writeable_array = array_api_compat.is_writeable_array
