"""Leaves a finished row of floats where matmuls read it: quantised, in tile order.

Knows nothing of what the row means. Layouts: `layout.py`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from edgeinfer.kernels.cpu.layout import (
    A32_BYTES,
    A32_D,
    A32_SUM,
    A256_BYTES,
    A256_D,
    A256_SUMS,
    MAX_TILE,
    SINK_A32,
    SINK_A256,
)
from edgeinfer.kernels.cpu.native.simd import (
    abs_f,
    add_i,
    load_rows_f32,
    max_f,
    max_lanes,
    mul_f,
    round_f,
    row,
    splat_f32,
    store_f32,
    store_i8x8,
    store_i16,
    store_i32,
    sum_lanes_i32,
    to_i32,
    word,
)

jit = njit(error_model="numpy")

_TOP = np.float32(127)
# Below this 127 / m overflows: such a block counts as zero.
_SMALLEST = np.float32(1e-36)


@jit
def tile_of(t, n_rows):
    """First row and size of the tile that row t of n_rows belongs to."""
    start, n = n_rows & -MAX_TILE, MAX_TILE // 2
    if t < start:
        return t & -MAX_TILE, MAX_TILE
    while n > 1 and (n_rows & n == 0 or t >= start + n):
        start += n_rows & n
        n >>= 1
    return start, n


@jit
def leave(x, dim, sink, t, n_rows):
    """Quantise row t, `dim` floats at x, into those of a sink's formats that are there."""
    start, n = tile_of(t, n_rows)
    a32, a256 = word(sink + SINK_A32), word(sink + SINK_A256)
    if a32 != 0:
        q = a32 + start * (dim // 32) * A32_BYTES + (t - start) * A32_BYTES
        for b in range(dim // 32):
            _quantise_32(x + 128 * b, q)
            q += n * A32_BYTES
    if a256 != 0:
        q = a256 + start * (dim // 256) * A256_BYTES + (t - start) * A256_BYTES
        for b in range(dim // 256):
            _quantise_256(x + 1024 * b, q)
            q += n * A256_BYTES


@jit
def _largest(x):
    """Lane by lane, the largest |x| of 32 floats."""
    v = abs_f(load_rows_f32(x, 32, 4))
    return max_f(max_f(row(v, 0), row(v, 1)), max_f(row(v, 2), row(v, 3)))


@jit
def _scales(m):
    """Factor to int8 and back, of a block whose largest |x| is m."""
    if m < _SMALLEST:
        return np.float32(0), np.float32(0)
    return _TOP / m, m / _TOP


@jit
def _store_q(x, q, inverse):
    """Quantise 32 floats; lane by lane the sums of the first and the second 16."""
    v = to_i32(round_f(mul_f(load_rows_f32(x, 32, 4), splat_f32(inverse))))
    store_i8x8(q, row(v, 0))
    store_i8x8(q + 8, row(v, 1))
    store_i8x8(q + 16, row(v, 2))
    store_i8x8(q + 24, row(v, 3))
    return add_i(row(v, 0), row(v, 1)), add_i(row(v, 2), row(v, 3))


@jit
def _quantise_32(x, q):
    inverse, d = _scales(max_lanes(_largest(x)))
    low, high = _store_q(x, q, inverse)
    store_f32(q + A32_D, d)
    store_i32(q + A32_SUM, sum_lanes_i32(add_i(low, high)))


@jit
def _quantise_256(x, q):
    m = _largest(x)
    for i in range(1, 8):
        m = max_f(m, _largest(x + 128 * i))
    inverse, d = _scales(max_lanes(m))
    for i in range(8):
        low, high = _store_q(x + 128 * i, q + 32 * i, inverse)
        store_i16(q + A256_SUMS + 4 * i, sum_lanes_i32(low))
        store_i16(q + A256_SUMS + 4 * i + 2, sum_lanes_i32(high))
    store_f32(q + A256_D, d)
    store_i32(q + A256_D + 4, 0)
