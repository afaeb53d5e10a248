"""`read`: touch memory and do nothing else, the yardstick for kernels bound by bandwidth.

Argument words: address, bytes, bytes per chunk, address of a word that takes the sum.
"""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.native.simd import (
    add_i,
    fetch_add,
    load_i32x8,
    prefetch,
    splat_i32,
    sum_lanes_i32,
    word,
)

_LINE = 64


def make(isa):
    jit = njit(error_model="numpy")

    @jit
    def total(p, end):
        a, b = splat_i32(0), splat_i32(0)
        while p < end:
            prefetch(p + 1024)
            a = add_i(a, load_i32x8(p))
            b = add_i(b, load_i32x8(p + 32))
            p += _LINE
        return sum_lanes_i32(add_i(a, b))

    def kernel(h, a, chunk, thread):
        address, n_bytes, step = word(a), word(a + 8), word(a + 16)
        first = address + chunk * step
        fetch_add(word(a + 24), total(first, min(first + step, address + n_bytes)))

    return kernel
