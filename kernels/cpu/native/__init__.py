"""Kernel sources: Python that Numba turns into machine code. Imported only while building kernels.

Every function here works on addresses (intp) and SIMD values; nothing is allocated or raised.
"""
