"""Kernels in CUDA C, and the devices that run them: GPUs through CuPy, and a shim on the CPU."""
