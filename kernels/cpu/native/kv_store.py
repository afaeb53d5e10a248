"""Puts heads of K and V into pages: as halves, or transformed and quantised in blocks of 32.

Knows no attention and no rotation. Codes, scales and the transform: `kernels/reference/caches.py`;
where they lie: `page_layout.py`.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit
from numba.extending import intrinsic

from edgeinfer.kernels.cpu.layout import whole_vectors
from edgeinfer.kernels.cpu.native import simd
from edgeinfer.kernels.cpu.native.copy_rows import copy
from edgeinfer.kernels.cpu.native.operations import (
    add_i,
    load_f32x8,
    load_rows_f32,
    local,
    max_f,
    max_lanes,
    min_f,
    mul_f,
    neg_f,
    or_i,
    round_f,
    row,
    shift_left,
    splat_f32,
    splat_i32,
    store_f16x8,
    store_f32x8,
    store_i8x8,
    store_rows,
    to_i32,
    zero_f32,
)
from edgeinfer.kernels.cpu.native.simd import I32
from edgeinfer.kernels.cpu.native.sink import largest
from edgeinfer.kernels.cpu.native.words import load_f16, load_f32, load_u32, store_f16, store_u32
from edgeinfer.kernels.cpu.page_layout import (
    GROUP,
    K_ROW_BYTES,
    KV_BYTES,
    PACKED_BYTES,
    SCALES_BYTES,
)

jit = njit(error_model="numpy")
_whole_vectors = jit(whole_vectors)

_ORDER = 64  # of the transform: floats that are made ready at a time
_BLOCK = 4 * 32  # bytes of a block of floats
_scratch = local(4 * _ORDER + 32)  # those floats, and the codes of a block


# -- the Hadamard transform ----------------------------------------------------------------------


def _butterfly_ir(b, v, step):
    """Lanes i without the bit `step`: v[i] + v[i + step]; the others: v[i - step] - v[i]."""
    others = ir.Constant(ir.VectorType(I32, 8), [i ^ step for i in range(8)])
    lanes = ir.Constant(ir.VectorType(I32, 8), [i + (8 if i & step else 0) for i in range(8)])
    moved = b.shuffle_vector(v, v, others)
    return b.shuffle_vector(b.fadd(v, moved), b.fsub(moved, v), lanes)


@intrinsic
def _transformed(typingctx, tile):
    """The transform of the 64 floats in a tile of 8 vectors."""

    def codegen(context, b, signature, values):
        rows = [b.extract_value(values[0], i) for i in range(8)]
        for step in (1, 2, 4):
            rows = [_butterfly_ir(b, v, step) for v in rows]
        for step in (1, 2, 4):
            for i in range(8):
                if not i & step:
                    x, y = rows[i], rows[i + step]
                    rows[i], rows[i + step] = b.fadd(x, y), b.fsub(x, y)
        eighth = simd.const_ir(simd.f32x8, 0.125)
        return simd.tile_ir(b, tile, (b.fmul(v, eighth) for v in rows))

    return tile(tile), codegen


@jit
def hadamard(x, n):
    """Transform n floats in place, 64 at a time."""
    for at in range(x, x + 4 * n, 4 * _ORDER):
        store_rows(at, 32, _transformed(load_rows_f32(at, 32, 8)))


@jit
def load_part(x, dim, start, out):
    """Values start to start + 63 of `dim` floats, zeros where there are none."""
    n = min(_ORDER, dim - start)
    if n < _ORDER:
        for at in range(out, out + 4 * _ORDER, 32):
            store_f32x8(at, zero_f32())
    copy(x + 4 * start, out, n)
    return n


# -- codes of a block of 32 floats ---------------------------------------------------------------


@jit
def _codes(x, d, least, most):
    inverse = np.float32(0)
    if d != 0:
        inverse = np.float32(1) / d
    v = round_f(mul_f(load_rows_f32(x, 32, 4), splat_f32(inverse)))
    # Both yield their second operand where one is no number, as in `math.exp`.
    return to_i32(min_f(splat_f32(most), max_f(splat_f32(least), v)))


@jit
def _codes_q8_0(x, scale):
    """Tile of the codes of 32 floats; their scale, a half, goes to an address."""
    store_f16(scale, largest(x) / np.float32(127))
    return _codes(x, load_f16(scale), np.float32(-127), np.float32(127))


@jit
def _codes_q4_0(x, scale):
    """Likewise, plus 8."""
    v = load_rows_f32(x, 32, 4)
    a, b, c, d = row(v, 0), row(v, 1), row(v, 2), row(v, 3)
    high = max_lanes(max_f(max_f(a, b), max_f(c, d)))
    low = -max_lanes(neg_f(min_f(min_f(a, b), min_f(c, d))))
    m = low
    if high > -low:
        m = high
    size = largest(x)
    if size != size:
        m = size
    store_f16(scale, m * np.float32(-0.125))
    return add_i(_codes(x, load_f16(scale), np.float32(-8), np.float32(7)), splat_i32(8))


# -- K -------------------------------------------------------------------------------------------


@jit
def _halves_of_k(k, page, place, dim, transforms, s):
    """One column of the page's [k_dim][32 positions]."""
    for j in range(dim):
        store_f16(page + K_ROW_BYTES * j + KV_BYTES * place, load_f32(k + 4 * j))


@jit
def _to_lane(words, packed, n):
    """n words of one position to its lane of n vectors."""
    for j in range(n):
        store_u32(packed + 32 * j, load_u32(words + 4 * j))


@jit
def _bytes_of_k(x, packed, lane, s):
    v = add_i(_codes_q8_0(x, packed + 2 * lane), splat_i32(128))
    store_i8x8(s, row(v, 0))
    store_i8x8(s + 8, row(v, 1))
    store_i8x8(s + 16, row(v, 2))
    store_i8x8(s + 24, row(v, 3))
    _to_lane(s, packed + 2 * GROUP + 4 * lane, 8)


@jit
def _nibbles_of_k(x, packed, lane, s):
    v = _codes_q4_0(x, packed + 2 * lane)
    store_i8x8(s, or_i(row(v, 0), shift_left(row(v, 2), 4)))
    store_i8x8(s + 8, or_i(row(v, 1), shift_left(row(v, 3), 4)))
    _to_lane(s, packed + 2 * GROUP + 4 * lane, 4)


def _blocks_of_k(kind, put):
    n_bytes = PACKED_BYTES[kind]

    @jit
    def store(k, page, place, dim, transforms, s):
        n_blocks, lane = (dim + 31) // 32, place % GROUP
        packed = page + place // GROUP * n_blocks * n_bytes
        for start in range(0, dim, _ORDER):
            n = load_part(k, dim, start, s)
            if transforms:
                hadamard(s, n)
            for x in range(s, s + 4 * n, _BLOCK):
                put(x, packed, lane, s + 4 * _ORDER)
                packed += n_bytes

    return store


# -- V -------------------------------------------------------------------------------------------


@jit
def _halves_of_v(v, page, place, dim, transforms, s):
    at, n_whole = page + KV_BYTES * _whole_vectors(dim) * place, dim & -8
    for j in range(0, n_whole, 8):
        store_f16x8(at + KV_BYTES * j, load_f32x8(v + 4 * j))
    for j in range(n_whole, dim):
        store_f16(at + KV_BYTES * j, load_f32(v + 4 * j))


@jit
def _bytes_of_v(x, scale, codes):
    v = _codes_q8_0(x, scale)
    store_i8x8(codes, row(v, 0))
    store_i8x8(codes + 8, row(v, 1))
    store_i8x8(codes + 16, row(v, 2))
    store_i8x8(codes + 24, row(v, 3))


@jit
def _nibbles_of_v(x, scale, codes):
    v = _codes_q4_0(x, scale)
    store_i8x8(codes, or_i(row(v, 0), shift_left(row(v, 1), 4)))
    store_i8x8(codes + 8, or_i(row(v, 2), shift_left(row(v, 3), 4)))


def _blocks_of_v(code_bytes, put):
    @jit
    def store(v, page, place, dim, transforms, s):
        n_blocks = (dim + 31) // 32
        scale = page + 2 * place
        codes = page + n_blocks * (SCALES_BYTES + place * code_bytes)
        for start in range(0, dim, _ORDER):
            n = load_part(v, dim, start, s)
            if transforms:
                hadamard(s, n)
            for x in range(s, s + 4 * n, _BLOCK):
                put(x, scale, codes)
                scale += SCALES_BYTES
                codes += code_bytes

    return store


# `store(x, page, place, dim, transforms, s)`: a head of `dim` floats at x to a position of its
# part of a page, with `scratch()` at s.
KEYS = {
    "f16": _halves_of_k,
    "q8_0": _blocks_of_k("q8_0", _bytes_of_k),
    "q4_0": _blocks_of_k("q4_0", _nibbles_of_k),
}
VALUES = {
    "f16": _halves_of_v,
    "q8_0": _blocks_of_v(32, _bytes_of_v),
    "q4_0": _blocks_of_v(16, _nibbles_of_v),
}


@jit
def no_scratch():
    return 0


def scratch(*kinds):
    """`scratch()`: memory for storing in these types."""
    return no_scratch if set(kinds) == {"f16"} else _scratch
