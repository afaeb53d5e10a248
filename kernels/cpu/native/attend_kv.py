"""How attention reads K and V of a page, by type: queries, scores of them, sums of values.

Knows no tables and no folding. What a tile of queries has in local memory is laid out here.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types

from edgeinfer.kernels.cpu.attention_layout import MAX_QUERIES
from edgeinfer.kernels.cpu.layout import A32_BYTES, PAGE
from edgeinfer.kernels.cpu.native.attention import grid, tile_of
from edgeinfer.kernels.cpu.native.formats import PRODUCTS
from edgeinfer.kernels.cpu.native.grid import Grid
from edgeinfer.kernels.cpu.native.kv_store import hadamard, load_part
from edgeinfer.kernels.cpu.native.operations import (
    load_f16x8,
    load_f32x8,
    load_u8x32,
    mul_f,
    prefetch,
    splat_f32,
    store_f32x8,
    zeros_f32,
)
from edgeinfer.kernels.cpu.native.simd import I8, I32, call, intp, scalar
from edgeinfer.kernels.cpu.native.sink import quantise_32
from edgeinfer.kernels.cpu.native.words import (
    load_f16,
    load_f32,
    load_i32,
    load_u16,
    load_u32,
    store_f16,
    store_f32,
    store_u16,
    store_u32,
)
from edgeinfer.kernels.cpu.page_layout import (
    GROUP,
    K_ROW_BYTES,
    KV_BYTES,
    PACKED_BYTES,
    SCALES_BYTES,
    VECTOR_BYTES,
    k_room,
    v_room,
)

jit = njit(error_model="numpy")
u32 = np.uint32

ROW = 4 * PAGE  # bytes of one query's scores in a page
# Local memory: scores, a vector of sums for each query, the maxima, fold weights, bounds, then
# of windows and soft-caps the first positions, that of an item's first row, and the cap; where V is
# in blocks the scores times their scales, of as many blocks as are added up side by side.
SUMS = MAX_QUERIES * ROW
MAXIMA = SUMS + MAX_QUERIES * 32
WEIGHTS = MAXIMA + 32
PART_WEIGHTS = WEIGHTS + 32
BOUNDS = PART_WEIGHTS + 32
LOWS = BOUNDS + 32
FIRST, CAP = LOWS + 32, LOWS + 36
SCALED = LOWS + 64
LOCAL_BYTES = SCALED + MAX_QUERIES * ROW
_VECTOR = 8 * KV_BYTES


def _widest(n, n_vectors, registers):
    """How many vectors beside each other for n queries: a divisor of n_vectors.

    n floats and one of the vectors are in registers beside the sums, of which 16 are enough.
    """
    top = max(1, min(16 // n, (registers - 1) // n - 1))
    return max(w for w in range(1, top + 1) if n_vectors % w == 0)


def _widest_of_blocks(n, n_vectors, registers):
    """Likewise: whole blocks of 4 vectors, or half of one."""
    top = registers // 2 // n
    return max((w for w in range(4, top + 1, 4) if n_vectors % w == 0), default=2)


def _emit_prefetch(b, p):
    address = b.inttoptr(p, I8.as_pointer())
    call(b, "llvm.prefetch.p0", ir.VoidType(), address, I32(0), I32(2), I32(1))


# Of halves, into the second-level cache: so few lines can be on their way to the first that pages
# arrive at 12 GB/s, not 20 (Zen 4, one core). Blocks are half the bytes, and faster from the first.
_prefetch_halves = scalar(types.void, (intp,), _emit_prefetch)


@jit
def bound(s, i):
    return load_i32(s + BOUNDS + 4 * i)


@jit
def low(s, i):
    return load_i32(s + LOWS + 4 * i)


# -- queries -------------------------------------------------------------------------------------


def queries_of(k_dim, kind, has_transform):
    """`gather(q, stride, group, n_queries, region, size, s)`: the queries of an item to its tiles.

    Row by row: as floats, or transformed and quantised for a K of blocks.
    """
    n_blocks = k_room(k_dim, kind) // 32

    @jit
    def as_floats(src, tile, n, lane, s):
        for j in range(k_dim):
            store_f32(tile + 4 * (n * j + lane), load_f32(src + 4 * j))

    @jit
    def as_blocks(src, tile, n, lane, s):
        at = tile + A32_BYTES * lane
        for b in range(n_blocks):
            x = s + 4 * 32 * (b % 2)
            if b % 2 == 0:
                n_loaded = load_part(src, k_dim, 32 * b, s)
                if has_transform:
                    hadamard(s, n_loaded)
            quantise_32(x, at)
            at += A32_BYTES * n

    put = as_floats if kind == "f16" else as_blocks

    @jit
    def gather(q, stride, group, n_queries, region, size, s):
        for i in range(n_queries):
            start, n = tile_of(i, n_queries)
            src = q + i // group * stride + i % group * k_dim * 4
            put(src, region + start * size, n, i - start, s)

    return gather


# -- scores --------------------------------------------------------------------------------------


def scores_of(isa, n, k_dim, kind):
    """`scores(tile, k, next_k, scale, s, last)`: of n queries, up to the vector of `last`."""
    if kind == "f16":
        return _scores_of_floats(n, k_dim, isa.registers)
    return _scores_of_blocks(isa, n, k_room(k_dim, kind) // 32, kind)


def _scores_of_floats(n, k_dim, registers):
    wide = _widest(n, 4, registers)
    multiply, _, _, store, _ = grid(n, wide)
    sums = n * wide

    @jit
    def scores(tile, k, next_k, scale, s, last):
        for first in range(0, (last + 7) // 8, wide):
            columns, soon = k + _VECTOR * first, next_k + _VECTOR * first * k_dim
            acc = zeros_f32(sums)
            for j in range(k_dim):
                _prefetch_halves(soon + _VECTOR * wide * j)
                acc = multiply(acc, tile + 4 * n * j, 4, columns + K_ROW_BYTES * j)
            store(s + 32 * first, ROW, mul_f(acc, splat_f32(scale)))

    return scores


def _scores_of_blocks(isa, n, n_blocks, kind):
    n_bytes, product = PACKED_BYTES[kind], PRODUCTS[kind](isa, load_u8x32)
    unpack, add = product.unpack, product.add(Grid(isa, 1, n, in_registers=True))
    _, _, _, store, _ = grid(n, 1)
    group_bytes = n_blocks * n_bytes

    @jit
    def scores(tile, k, next_k, scale, s, last):
        for group in range((last + GROUP - 1) // GROUP):
            packed, soon, q = k + group_bytes * group, next_k + group_bytes * group, tile
            acc = zeros_f32(n)
            for _ in range(n_blocks):
                for line in range(0, n_bytes, 64):
                    prefetch(soon + line)
                acc = add(unpack(packed, 0), q, acc)
                packed += n_bytes
                soon += n_bytes
                q += A32_BYTES * n
            store(s + 32 * group, ROW, mul_f(acc, splat_f32(scale)))

    return scores


# -- sums of values ------------------------------------------------------------------------------


def values_of(n, v_dim, kind, registers, is_windowed):
    """`add_to(o, v, next_v, starts, s, common, last)`: what n queries see of V, into their state.

    All see `common` positions of the page, the last query `last`. The scores are p.
    """
    room = v_room(v_dim, kind)
    wide = (_widest if kind == "f16" else _widest_of_blocks)(n, room // 8, registers)
    multiply, multiply_visible, multiply_between, store, fold = grid(n, wide, kind)
    row_bytes, step_bytes = room // 8 * VECTOR_BYTES[kind], wide * VECTOR_BYTES[kind]
    scale_values = _scale_values(n, wide) if kind != "f16" else _keep_values
    codes = 0 if kind == "f16" else room // 32 * SCALES_BYTES
    x, sums, o_stride = 0 if kind == "f16" else SCALED, n * wide, 4 * room
    fetch = _prefetch_halves if kind == "f16" else prefetch

    @jit
    def whole_page(acc, s, column, soon):
        """A loop of its own: in one whose length is not known LLVM spills sums."""
        for pos in range(PAGE):
            fetch(soon + step_bytes * pos)
            acc = multiply(acc, s + x + 4 * pos, ROW, column + row_bytes * pos)
        return acc

    @jit
    def up_to_bounds(acc, s, column, soon, common, last):
        if common == PAGE:
            return whole_page(acc, s, column, soon)
        for pos in range(common):
            fetch(soon + step_bytes * pos)
            acc = multiply(acc, s + x + 4 * pos, ROW, column + row_bytes * pos)
        for pos in range(common, last):
            p, seen = s + x + 4 * pos, column + row_bytes * pos
            acc = multiply_visible(acc, p, ROW, seen, s + BOUNDS, pos)
        return acc

    @jit
    def between(acc, s, column, first, end):
        for pos in range(first, end):
            p, seen = s + x + 4 * pos, column + row_bytes * pos
            acc = multiply_between(acc, p, ROW, seen, s + BOUNDS, pos, s + LOWS)
        return acc

    @jit
    def within_bounds(acc, s, column, soon, common, last):
        first, all_begun = low(s, 0), low(s, n - 1)
        if all_begun <= 0 and common == PAGE:
            return whole_page(acc, s, column, soon)
        acc = between(acc, s, column, first, all_begun)
        for pos in range(all_begun, common):
            fetch(soon + step_bytes * pos)
            acc = multiply(acc, s + x + 4 * pos, ROW, column + row_bytes * pos)
        return between(acc, s, column, max(all_begun, common), last)

    add = within_bounds if is_windowed else up_to_bounds

    @jit
    def add_to(o, v, next_v, starts, s, common, last):
        for step in range(room // (8 * wide)):
            column, soon = v + codes + step_bytes * step, next_v + PAGE * step_bytes * step
            scale_values(s, v, step)
            acc = add(zeros_f32(sums), s, column, soon, common, last)
            if starts:
                store(o + 32 * wide * step, o_stride, acc)
            else:
                fold(o + 32 * wide * step, o_stride, acc, s + WEIGHTS, s + PART_WEIGHTS)

    return add_to


@jit
def _keep_values(s, v, step):
    pass


def _scale_values(n, wide):
    """`scale_values(s, v, step)`: p times the scales of the blocks that a step adds up."""
    n_blocks = max(1, wide // 4)

    @jit
    def scale_values(s, v, step):
        scales = v + SCALES_BYTES * (step * wide // 4)
        for b in range(n_blocks):
            for at in range(0, ROW, 32):
                d = load_f16x8(scales + SCALES_BYTES * b + at // 2)
                for i in range(n):
                    p = load_f32x8(s + ROW * i + at)
                    store_f32x8(s + SCALED + ROW * (n * b + i) + at, mul_f(p, d))

    return scale_values


# -- K that serves as V --------------------------------------------------------------------------


@jit
def own_values(k, v, scratch):
    """Where a page's values are."""
    return v


def shared_values(k_dim, v_dim, kind):
    """`values_in(k, v, scratch)`: the same, where they are K's: turned, of blocks as q8_0."""
    return _shared_halves(k_dim, v_dim) if kind == "f16" else _shared_blocks(k_dim, v_dim, kind)


def _shared_halves(k_dim, v_dim):
    room = v_room(v_dim, "f16")
    n = min(k_dim, room)

    @jit
    def turned(k, v, scratch):
        for d in range(n):
            for pos in range(PAGE):
                half = load_f16(k + K_ROW_BYTES * d + KV_BYTES * pos)
                store_f16(scratch + KV_BYTES * (room * pos + d), half)
        return scratch

    return turned


@jit
def _codes_of_bytes(packed, lane, out):
    for j in range(8):
        word = load_u32(packed + 2 * GROUP + 32 * j + 4 * lane)
        store_u32(out + 4 * j, word ^ u32(0x80808080))


@jit
def _signed(nibbles):
    """Of four nibbles in bytes, each less 8."""
    turned = nibbles ^ u32(0x08080808)
    return turned | (turned & u32(0x08080808)) * u32(0x1E)


@jit
def _codes_of_nibbles(packed, lane, out):
    for j in range(4):
        word = load_u32(packed + 2 * GROUP + 32 * j + 4 * lane)
        store_u32(out + 4 * j, _signed(word & u32(0x0F0F0F0F)))
        store_u32(out + 16 + 4 * j, _signed((word >> u32(4)) & u32(0x0F0F0F0F)))


def _shared_blocks(k_dim, v_dim, kind):
    codes_of = {"q8_0": _codes_of_bytes, "q4_0": _codes_of_nibbles}[kind]
    n_bytes, n_k_blocks = PACKED_BYTES[kind], k_room(k_dim, kind) // 32
    room = v_room(v_dim, kind)
    n_blocks = room // 32

    @jit
    def turned(k, v, scratch):
        for pos in range(PAGE):
            packed, lane = k + pos // GROUP * n_k_blocks * n_bytes, pos % GROUP
            out = scratch + n_blocks * SCALES_BYTES + room * pos
            for b in range(n_blocks):
                scale = load_u16(packed + 2 * lane)
                store_u16(scratch + SCALES_BYTES * b + 2 * pos, scale)
                codes_of(packed, lane, out + 32 * b)
                packed += n_bytes
        return scratch

    return turned
