"""Adds up what the experts of a row have left, in the order of its route. Knows no weights."""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.layout import (
    H_ROWS,
    SUM_DIM,
    SUM_N_USED,
    SUM_ROUTE,
    SUM_ROUTE_STRIDE,
    SUM_SINK,
    SUM_STRIDE,
    SUM_X,
)
from edgeinfer.kernels.cpu.native.operations import (
    add_f,
    load_f32x8,
    load_splat_f32,
    mul_f,
    store_f32x8,
)
from edgeinfer.kernels.cpu.native.sink import finish_row, row_at
from edgeinfer.kernels.cpu.native.words import load_f32, store_f32, word

jit = njit(error_model="numpy")


@jit
def _add_up(x, weights, n_used, dim, out):
    n_whole = dim & -8
    for i in range(0, 4 * n_whole, 32):
        acc = mul_f(load_f32x8(x + i), load_splat_f32(weights))
        for slot in range(1, n_used):
            part = load_f32x8(x + 4 * dim * slot + i)
            acc = add_f(acc, mul_f(part, load_splat_f32(weights + 4 * slot)))
        store_f32x8(out + i, acc)
    for i in range(4 * n_whole, 4 * dim, 4):
        total = load_f32(x + i) * load_f32(weights)
        for slot in range(1, n_used):
            total += load_f32(x + 4 * dim * slot + i) * load_f32(weights + 4 * slot)
        store_f32(out + i, total)


def make(isa):
    def kernel(h, a, chunk, thread):
        n_used, dim, sink = word(a + SUM_N_USED), word(a + SUM_DIM), a + SUM_SINK
        x = word(a + SUM_X) + chunk * word(a + SUM_STRIDE)
        weights = word(a + SUM_ROUTE) + chunk * word(a + SUM_ROUTE_STRIDE) + 4 * n_used
        out = row_at(sink, chunk, thread)
        _add_up(x, weights, n_used, dim, out)
        finish_row(out, dim, sink, chunk, word(h + H_ROWS))

    return kernel
