"""Puts a finished row of floats where matmuls read it: quantised, in tile order.

Knows nothing of what the row means. Layouts: `layout.py`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from edgeinfer.kernels.cpu.layout import (
    A32_BYTES,
    A32_D,
    A32_DSUM,
    A32_SUMS,
    ALL_ROWS,
    H_ROWS,
    H_WANTED_ROWS,
    MAX_TILE,
    SINK_A32,
    SINK_F32,
    SINK_STRIDE,
    SINK_THREAD_STRIDE,
    whole_vectors,
)
from edgeinfer.kernels.cpu.native.operations import (
    abs_f,
    add_i,
    load_rows_f32,
    max_size,
    max_size_lanes,
    mul_f,
    round_f,
    row,
    splat_f32,
    store_i8x8,
    sum_lanes_i32,
    to_i32,
)
from edgeinfer.kernels.cpu.native.words import store_f32, store_i16, word

jit = njit(error_model="numpy")
_whole_vectors = jit(whole_vectors)

_TOP = np.float32(127)
# Below this 127 / m overflows: such a block counts as zero.
_SMALLEST = np.float32(1e-36)


@jit
def n_rows_of(h, which):
    """How many rows an op has in this step."""
    return word(h + H_ROWS) if which == ALL_ROWS else word(h + H_WANTED_ROWS)


@jit
def tile_of(t, n_rows):
    """First row and size of the tile that row t of n_rows belongs to."""
    start = t & -MAX_TILE
    return start, min(MAX_TILE, n_rows - start)


@jit
def row_at(sink, t, thread):
    """Where the floats of row t go."""
    at = word(sink + SINK_F32) + t * word(sink + SINK_STRIDE)
    return at + thread * word(sink + SINK_THREAD_STRIDE)


@jit
def clear_behind(x, dim):
    """Zeros behind a row's last value, to the end of its vector."""
    for i in range(dim, _whole_vectors(dim)):
        store_f32(x + 4 * i, np.float32(0))


@jit
def finish_row(x, dim, sink, t, n_rows):
    """Row t is whole, `dim` floats at x: quantise it where the sink has a place for that."""
    clear_behind(x, dim)
    a32 = word(sink + SINK_A32)
    if a32 == 0:
        return
    start, n = tile_of(t, n_rows)
    q = a32 + start * (dim // 32) * A32_BYTES + (t - start) * A32_BYTES
    for b in range(dim // 32):
        quantise_32(x + 128 * b, q)
        q += n * A32_BYTES


@jit
def largest(x):
    """The largest |x| of 32 floats; what is no number is larger than any."""
    v = abs_f(load_rows_f32(x, 32, 4))
    top = max_size(max_size(row(v, 0), row(v, 1)), max_size(row(v, 2), row(v, 3)))
    return max_size_lanes(top)


@jit
def _scales(m):
    """Factor to int8 and back, of a block whose largest |x| is m."""
    if m < _SMALLEST:
        return np.float32(0), np.float32(0)
    return _TOP / m, m / _TOP


@jit
def quantise_32(x, q):
    """One block of a32, at q, of 32 floats."""
    inverse, d = _scales(largest(x))
    v = to_i32(round_f(mul_f(load_rows_f32(x, 32, 4), splat_f32(inverse))))
    store_i8x8(q, row(v, 0))
    store_i8x8(q + 8, row(v, 1))
    store_i8x8(q + 16, row(v, 2))
    store_i8x8(q + 24, row(v, 3))
    first = sum_lanes_i32(add_i(row(v, 0), row(v, 1)))
    last = sum_lanes_i32(add_i(row(v, 2), row(v, 3)))
    store_f32(q + A32_D, d)
    store_f32(q + A32_DSUM, d * np.float32(np.int32(first + last)))
    store_i16(q + A32_SUMS, first)
    store_i16(q + A32_SUMS + 2, last)
