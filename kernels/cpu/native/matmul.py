"""matmul.<type>: packed weights times a step's activations, for any number of tokens.

Knows nothing of a type's blocks beyond their sizes. One walk over the weights serves decode and
prefill: the number of tokens in a tile changes how often a block is read, never the order in which
the products of one row and token are added.
"""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.formats import FORMATS as SIZES
from edgeinfer.kernels.cpu.layout import (
    A32_BYTES,
    H_ROWS,
    H_WANTED_ROWS,
    MATMUL_BIAS,
    MATMUL_BIG_CHUNK,
    MATMUL_N_BIG,
    MATMUL_N_BLOCKS,
    MATMUL_N_GROUPS,
    MATMUL_OUT,
    MATMUL_RESIDUAL,
    MATMUL_ROWS,
    MATMUL_SMALL_CHUNK,
    MATMUL_STRIDE,
    MATMUL_W,
    MATMUL_X,
    MATMUL_X_ROW_BYTES,
    WANTED_ROWS,
)
from edgeinfer.kernels.cpu.native.formats import FORMATS
from edgeinfer.kernels.cpu.native.simd import (
    add_f,
    load_f32x8,
    load_rows_f32,
    load_u8x32,
    prefetch,
    store_rows,
    word,
    zeros_f32,
)

jit = njit(error_model="numpy")

_PREFETCH = 2048  # bytes ahead, for tiles too small to hide memory: see tests/bench/TUNING.md


def make(isa, type_name):
    tiles = {n: _tile(isa, type_name, n) for n in (8, 4, 2, 1)}
    eight, four, two, one = tiles[8], tiles[4], tiles[2], tiles[1]

    def kernel(header, args, chunk):
        rows = word(header + H_ROWS)
        if word(args + MATMUL_ROWS) == WANTED_ROWS:
            rows = word(header + H_WANTED_ROWS)
        n_big, big = word(args + MATMUL_N_BIG), word(args + MATMUL_BIG_CHUNK)
        small = word(args + MATMUL_SMALL_CHUNK)
        first = min(chunk, n_big) * big + max(chunk - n_big, 0) * small
        last = min(word(args + MATMUL_N_GROUPS), first + (big if chunk < n_big else small))
        t = 0
        while t + 8 <= rows:
            eight(args, first, last, t)
            t += 8
        if rows & 4:
            four(args, first, last, t)
            t += 4
        if rows & 2:
            two(args, first, last, t)
            t += 2
        if rows & 1:
            one(args, first, last, t)

    return kernel


def _tile(isa, type_name, n):
    """All groups of a chunk for the tile of n tokens that starts at t."""
    form = SIZES[type_name]
    block, packed_bytes, in_tiles = form.block, form.packed_bytes, form.activation == "a32"
    # Tokens whose sums fit in registers; the others of the tile read the group again, from L1.
    n_at_once = min(n, isa.registers // 4 if FORMATS[type_name].n_accumulators > 1 else 8)
    walk = _walk(isa, type_name, n_at_once, _PREFETCH if n < 4 else 0)

    @jit
    def tile(args, first, last, t):
        w, n_blocks = word(args + MATMUL_W), word(args + MATMUL_N_BLOCKS)
        x_stride = word(args + MATMUL_X_ROW_BYTES)
        x = word(args + MATMUL_X) + t * x_stride
        x_step = 4 * block
        if in_tiles:
            x_stride = A32_BYTES
            x_step = block // 32 * n * A32_BYTES
        stride = word(args + MATMUL_STRIDE)
        out = word(args + MATMUL_OUT) + t * stride
        bias, residual = word(args + MATMUL_BIAS), word(args + MATMUL_RESIDUAL)
        if residual:
            residual += t * stride
        for g in range(first, last):
            p = w + g * n_blocks * packed_bytes
            for i in range(0, n, n_at_once):
                acc = walk(p, n_blocks, x + i * x_stride, x_stride, x_step)
                if bias:
                    acc = add_f(acc, load_f32x8(bias + 32 * g))
                at = 32 * g + i * stride
                if residual:
                    acc = add_f(load_rows_f32(residual + at, stride, n_at_once), acc)
                store_rows(out + at, stride, acc)

    return tile


def _walk(isa, type_name, n, ahead):
    """The sums of one group of 8 rows for n tokens; prefetches `ahead` bytes where not zero."""
    form = SIZES[type_name]
    packed_bytes = form.packed_bytes
    # What the weight loads do not touch: all of a float block, the scales of a block of 256.
    n_lines = packed_bytes // 64 if form.activation == "f32" else 3 * (form.block == 256)

    @jit
    def load_ahead(p):
        prefetch(p + ahead)
        return load_u8x32(p)

    add = FORMATS[type_name].accumulate(isa, n, load_ahead if ahead else load_u8x32)

    @jit
    def blocks(p, n_blocks, x, x_stride, x_step, acc):
        for _ in range(n_blocks):
            if ahead:
                for i in range(n_lines):
                    prefetch(p + ahead + 64 * i)
            acc = add(p, x, x_stride, acc)
            p += packed_bytes
            x += x_step
        return acc

    @jit
    def one_sum(p, n_blocks, x, x_stride, x_step):
        return blocks(p, n_blocks, x, x_stride, x_step, zeros_f32(n))

    @jit
    def four_sums(p, n_blocks, x, x_stride, x_step):
        start = (zeros_f32(n), zeros_f32(n), zeros_f32(n), zeros_f32(n))
        a, b, c, d = blocks(p, n_blocks, x, x_stride, x_step, start)
        return add_f(add_f(a, b), add_f(c, d))

    return four_sums if FORMATS[type_name].n_accumulators == 4 else one_sum
