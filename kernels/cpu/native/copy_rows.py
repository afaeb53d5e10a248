"""Copies rows of floats, all or the wanted ones. Knows no model."""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.layout import (
    COPY_DIM,
    COPY_ROWS,
    COPY_SINK,
    COPY_STRIDE,
    COPY_X,
    H_WANTED,
    PICKED_ROWS,
)
from edgeinfer.kernels.cpu.native.operations import load_f32x8, store_f32x8
from edgeinfer.kernels.cpu.native.sink import finish_row, n_rows_of, row_at
from edgeinfer.kernels.cpu.native.words import load_f32, load_i32, store_f32, word

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
        n_rows, source = n_rows_of(h, word(a + COPY_ROWS)), chunk
        if word(a + COPY_ROWS) == PICKED_ROWS:
            source = load_i32(word(h + H_WANTED) + 4 * chunk)
        dim, sink = word(a + COPY_DIM), a + COPY_SINK
        out = row_at(sink, chunk, thread)
        copy(word(a + COPY_X) + source * word(a + COPY_STRIDE), out, dim)
        finish_row(out, dim, sink, chunk, n_rows)

    return kernel
