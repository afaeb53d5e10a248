"""`read`: touch memory and do nothing else, the yardstick for kernels bound by bandwidth.

Argument words: address, bytes, bytes per chunk, address of a word that takes the sum. It reads as
matmuls of one token do, in two streams: one reaches 10 to 20 % less. Of an odd number of lines in
a chunk the last stays unread.
"""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.native.operations import (
    add_i,
    load_i32x8,
    prefetch,
    splat_i32,
    sum_lanes_i32,
)
from edgeinfer.kernels.cpu.native.words import fetch_add, word

_LINE, _AHEAD = 64, 1024


def make(isa):
    jit = njit(error_model="numpy")

    @jit
    def total(p, apart):
        """Two streams, each of `apart` bytes."""
        a, b, end = splat_i32(0), splat_i32(0), p + apart
        while p < end:
            prefetch(p + _AHEAD)
            prefetch(p + apart + _AHEAD)
            a = add_i(add_i(a, load_i32x8(p)), load_i32x8(p + 32))
            b = add_i(add_i(b, load_i32x8(p + apart)), load_i32x8(p + apart + 32))
            p += _LINE
        return sum_lanes_i32(add_i(a, b))

    def kernel(h, a, chunk, thread):
        address, n_bytes, step = word(a), word(a + 8), word(a + 16)
        first = chunk * step
        half = min(step, n_bytes - first) // (2 * _LINE) * _LINE
        fetch_add(word(a + 24), total(address + first, half))

    return kernel
