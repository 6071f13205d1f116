"""CUDA kernels for the arrays of any library: one source, compiled by NVRTC and launched here.

`walks` sees arrays as matrices, `tables` cuts these into tiles, `compiler` compiles a kernel for
them, and `launcher` launches it through a driver from `drivers`. No table is kept on the device: a
launch takes all addresses and shapes by value. So a CUDA graph can capture it, any number of times.
"""
