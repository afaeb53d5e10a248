"""Copies rows of floats, all or the wanted ones. Knows no model."""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.layout import (
    COPY_DIM,
    COPY_OUT,
    COPY_OUT_STRIDE,
    COPY_ROWS,
    COPY_STRIDE,
    COPY_X,
    H_WANTED,
    WANTED_ROWS,
)
from edgeinfer.kernels.cpu.native.simd import (
    load_f32,
    load_f32x8,
    load_i32,
    store_f32,
    store_f32x8,
    word,
)

jit = njit(error_model="numpy")


@jit
def copy(x, out, n):
    """Copy n floats."""
    i = 0
    while i + 8 <= n:
        store_f32x8(out + 4 * i, load_f32x8(x + 4 * i))
        i += 8
    while i < n:
        store_f32(out + 4 * i, load_f32(x + 4 * i))
        i += 1


def make(isa):
    def kernel(h, a, chunk, thread):
        source = chunk
        if word(a + COPY_ROWS) == WANTED_ROWS:
            source = load_i32(word(h + H_WANTED) + 4 * chunk)
        x = word(a + COPY_X) + source * word(a + COPY_STRIDE)
        copy(x, word(a + COPY_OUT) + chunk * word(a + COPY_OUT_STRIDE), word(a + COPY_DIM))

    return kernel
