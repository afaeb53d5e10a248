"""Folds what the work items left for one row into the row of attention. Knows no K or V."""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.layout import (
    ATTEND_K_DIM,
    ATTEND_N_HEADS,
    ATTEND_N_KV_HEADS,
    ATTEND_PARTS,
    ATTEND_SINK,
    ATTEND_V_DIM,
    H_ITEMS,
    H_ROWS,
    QUERY_EXTRA,
    ROW_BYTES,
    ROW_INDEX,
    ROW_ITEM_ROWS,
    ROW_N_PARTS,
    ROW_PART,
    whole_vectors,
)
from edgeinfer.kernels.cpu.native.attention import fold_weights, tile_of
from edgeinfer.kernels.cpu.native.copy_rows import copy
from edgeinfer.kernels.cpu.native.simd import (
    div_f,
    fma,
    load_f32x8,
    load_splat_f32,
    mul_f,
    splat_f32,
    store_f32x8,
    word,
)
from edgeinfer.kernels.cpu.native.sink import finish_row, row_at

jit = njit(error_model="numpy")
_whole_vectors = jit(whole_vectors)


@jit
def _fold_head(tile, step, n_parts, lane, n, k_dim, v_dim, out):
    """Query `lane` of a tile of n, whose parts lie `step` bytes apart, folded into the first."""
    room, n_whole = _whole_vectors(v_dim), v_dim & -8
    o, tops = tile + 4 * (n * k_dim + lane * room), tile + 4 * n * (k_dim + 2 * room) + 4 * lane
    m, l = load_splat_f32(tops), load_splat_f32(tops + 32)  # noqa: E741
    for part in range(1, n_parts):
        at = part * step
        m, l, a, b = fold_weights(  # noqa: E741
            m, load_splat_f32(tops + at), l, load_splat_f32(tops + at + 32)
        )
        for d in range(0, 4 * room, 32):
            scaled = mul_f(load_f32x8(o + at + d), b)
            store_f32x8(o + d, fma(load_f32x8(o + d), a, scaled))
    inverse = div_f(splat_f32(1.0), l)
    for d in range(0, 4 * n_whole, 32):
        store_f32x8(out + d, mul_f(load_f32x8(o + d), inverse))
    if n_whole < v_dim:
        store_f32x8(o, mul_f(load_f32x8(o + 4 * n_whole), inverse))
        copy(o, out + 4 * n_whole, v_dim - n_whole)


def make(isa):
    def kernel(h, a, chunk, thread):
        k_dim, v_dim = word(a + ATTEND_K_DIM), word(a + ATTEND_V_DIM)
        n_heads = word(a + ATTEND_N_HEADS)
        size = 4 * (k_dim + 2 * _whole_vectors(v_dim) + QUERY_EXTRA)
        group = n_heads // word(a + ATTEND_N_KV_HEADS)
        record = word(h + H_ITEMS) + ROW_BYTES * chunk
        n_rows, index = word(record + ROW_ITEM_ROWS), word(record + ROW_INDEX)
        parts = word(a + ATTEND_PARTS) + word(record + ROW_PART) * n_heads * size
        step, n_queries, sink = n_rows * n_heads * size, n_rows * group, a + ATTEND_SINK
        out = row_at(sink, chunk, thread)
        for head in range(n_heads):
            query = index * group + head % group
            start, n = tile_of(query, n_queries)
            tile = parts + (head // group * n_queries + start) * size
            _fold_head(
                tile, step, word(record + ROW_N_PARTS), query - start, n, k_dim, v_dim,
                out + 4 * head * v_dim,
            )  # fmt: skip
        finish_row(out, n_heads * v_dim, sink, chunk, word(h + H_ROWS))

    return kernel
