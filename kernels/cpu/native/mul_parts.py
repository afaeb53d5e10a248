"""Multiplies each part of a row by a factor of its own. Knows no model."""

from __future__ import annotations

from edgeinfer.kernels.cpu.layout import (
    PARTS_DIM,
    PARTS_FACTORS,
    PARTS_FACTORS_STRIDE,
    PARTS_N,
    PARTS_ROWS,
    PARTS_SINK,
    PARTS_STRIDE,
    PARTS_X,
)
from edgeinfer.kernels.cpu.native.operations import load_f32x8, mul_f, splat_f32, store_f32x8
from edgeinfer.kernels.cpu.native.sink import finish_row, n_rows_of, row_at
from edgeinfer.kernels.cpu.native.words import load_f32, store_f32, word


def make(isa):
    def kernel(h, a, chunk, thread):
        n_rows = n_rows_of(h, word(a + PARTS_ROWS))
        n_parts, dim, sink = word(a + PARTS_N), word(a + PARTS_DIM), a + PARTS_SINK
        x = word(a + PARTS_X) + chunk * word(a + PARTS_STRIDE)
        factors = word(a + PARTS_FACTORS) + chunk * word(a + PARTS_FACTORS_STRIDE)
        out, n_whole = row_at(sink, chunk, thread), dim & -8
        for part in range(n_parts):
            factor, at = load_f32(factors + 4 * part), 4 * dim * part
            for i in range(at, at + 4 * n_whole, 32):
                store_f32x8(out + i, mul_f(load_f32x8(x + i), splat_f32(factor)))
            for i in range(at + 4 * n_whole, at + 4 * dim, 4):
                store_f32(out + i, load_f32(x + i) * factor)
        finish_row(out, n_parts * dim, sink, chunk, n_rows)

    return kernel
