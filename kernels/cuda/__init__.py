"""Kernels in CUDA C. Nothing here runs yet: the CUDA backend has its own issue."""
