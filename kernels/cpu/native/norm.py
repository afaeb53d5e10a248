"""RMS norm of rows. Knows no model."""

from __future__ import annotations

import numpy as np
from numba import njit

from edgeinfer.kernels.cpu.layout import (
    H_WANTED,
    NORM_DIM,
    NORM_EPS,
    NORM_ROWS,
    NORM_SINK,
    NORM_STRIDE,
    NORM_WEIGHT,
    NORM_X,
    PICKED_ROWS,
)
from edgeinfer.kernels.cpu.native.operations import (
    add_f,
    fma,
    insert_f32,
    load_f32x8,
    load_rows_f32,
    mul_f,
    row,
    splat_f32,
    store_f32x8,
    sum_lanes,
    zero_f32,
    zeros_f32,
)
from edgeinfer.kernels.cpu.native.sink import finish_row, n_rows_of, row_at
from edgeinfer.kernels.cpu.native.words import (
    load_f32,
    load_i32,
    sqrt_f32,
    store_f32,
    word,
)

jit = njit(error_model="numpy")


@jit
def sum_squares(x, n):
    """Sum of n squares in the lane-sum order."""
    acc = zeros_f32(4)
    for _ in range(n // 32):
        v = load_rows_f32(x, 32, 4)
        acc = fma(v, v, acc)
        x += 128
    a0, a1, a2, a3 = row(acc, 0), row(acc, 1), row(acc, 2), row(acc, 3)
    rest = n % 32
    if rest > 0:
        a0 = _add_squares(x, rest, a0)
        a1 = _add_squares(x + 32, rest - 8, a1)
        a2 = _add_squares(x + 64, rest - 16, a2)
        a3 = _add_squares(x + 96, rest - 24, a3)
    return sum_lanes(add_f(add_f(a0, a1), add_f(a2, a3)))


@jit
def _add_squares(x, n, acc):
    """Of the first n of 8 floats; 0 squared changes no sum."""
    v = zero_f32()
    if n >= 8:
        v = load_f32x8(x)
    else:
        for i in range(n):
            v = insert_f32(v, load_f32(x + 4 * i), i)
    return fma(v, v, acc)


@jit
def normalise(x, weight, eps, n, out):
    """RMS norm of n floats; `out` may be `x`."""
    mean = sum_squares(x, n) / np.float32(n)
    s, n_whole = np.float32(1) / sqrt_f32(mean + eps), n & -8
    for i in range(0, 4 * n_whole, 32):
        store_f32x8(out + i, mul_f(mul_f(load_f32x8(x + i), splat_f32(s)), load_f32x8(weight + i)))
    for i in range(4 * n_whole, 4 * n, 4):
        store_f32(out + i, (load_f32(x + i) * s) * load_f32(weight + i))


def make(isa):
    def kernel(h, a, chunk, thread):
        n_rows, source = n_rows_of(h, word(a + NORM_ROWS)), chunk
        if word(a + NORM_ROWS) == PICKED_ROWS:
            source = load_i32(word(h + H_WANTED) + 4 * chunk)
        dim, sink = word(a + NORM_DIM), a + NORM_SINK
        x = word(a + NORM_X) + source * word(a + NORM_STRIDE)
        out = row_at(sink, chunk, thread)
        normalise(x, word(a + NORM_WEIGHT), load_f32(a + NORM_EPS), dim, out)
        finish_row(out, dim, sink, chunk, n_rows)

    return kernel
