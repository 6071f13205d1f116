"""CUDA kernels for the arrays of any library: one source, compiled by NVRTC and launched here.

`tables` sees arrays as matrices and cuts these into tiles; `launcher` compiles a kernel for them,
and launches it through a `_Host`. No table is kept on the device: a launch takes all addresses and
shapes by value. So a CUDA graph can capture it, any number of times.
"""
