"""RMS norm of parts of rows, with or without a weight. Knows no model."""

from __future__ import annotations

import numpy as np
from numba import njit

from edgeinfer.kernels.cpu.layout import (
    NORM_HEADS_DIM,
    NORM_HEADS_EPS,
    NORM_HEADS_N,
    NORM_HEADS_ROWS,
    NORM_HEADS_SINK,
    NORM_HEADS_STRIDE,
    NORM_HEADS_WEIGHT,
    NORM_HEADS_X,
)
from edgeinfer.kernels.cpu.native.norm import normalise, sum_squares
from edgeinfer.kernels.cpu.native.sink import finish_row, n_rows_of, row_at
from edgeinfer.kernels.cpu.native.words import load_f32, sqrt_f32, store_f32, word

jit = njit(error_model="numpy")


@jit
def _normalise_plain(x, eps, n, out):
    s = np.float32(1) / sqrt_f32(sum_squares(x, n) / np.float32(n) + eps)
    for i in range(0, 4 * n, 4):
        store_f32(out + i, load_f32(x + i) * s)


def make(isa):
    def kernel(h, a, chunk, thread):
        n_rows = n_rows_of(h, word(a + NORM_HEADS_ROWS))
        n_heads, dim, sink = word(a + NORM_HEADS_N), word(a + NORM_HEADS_DIM), a + NORM_HEADS_SINK
        weight, eps = word(a + NORM_HEADS_WEIGHT), load_f32(a + NORM_HEADS_EPS)
        x = word(a + NORM_HEADS_X) + chunk * word(a + NORM_HEADS_STRIDE)
        out = row_at(sink, chunk, thread)
        for i in range(n_heads):
            at = 4 * dim * i
            if weight != 0:
                normalise(x + at, weight, eps, dim, out + at)
            else:
                _normalise_plain(x + at, eps, dim, out + at)
        finish_row(out, n_heads * dim, sink, chunk, n_rows)

    return kernel
