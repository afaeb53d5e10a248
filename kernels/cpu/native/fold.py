"""Folds what the work items left for one row into the row of attention. Knows no K or V."""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.attention_layout import (
    ATTEND_ITEMS,
    ATTEND_K_ROOM,
    ATTEND_N_HEADS,
    ATTEND_N_KV_HEADS,
    ATTEND_PARTS,
    ATTEND_SINKS,
    ATTEND_V_DIM,
    ATTEND_V_ROOM,
    FOLD_SINK,
    ITEMS_ROWS,
    ROW_BYTES,
    ROW_INDEX,
    ROW_ITEM_ROWS,
    ROW_N_PARTS,
    ROW_PART,
    query_bytes,
)
from edgeinfer.kernels.cpu.layout import H_ROWS
from edgeinfer.kernels.cpu.native.attention import fold_weights, tile_of
from edgeinfer.kernels.cpu.native.copy_rows import copy
from edgeinfer.kernels.cpu.native.kv_store import hadamard
from edgeinfer.kernels.cpu.native.operations import (
    div_f,
    fma,
    load_f32x8,
    load_splat_f32,
    mul_f,
    splat_f32,
    store_f32x8,
)
from edgeinfer.kernels.cpu.native.sink import finish_row, row_at
from edgeinfer.kernels.cpu.native.words import word

jit = njit(error_model="numpy")
_query_bytes = jit(query_bytes)


@jit
def _no_sink(m, l, sink):  # noqa: E741
    return l, splat_f32(1.0)


@jit
def _with_sink(m, l, sink):  # noqa: E741
    """The sum with a score that has no value, and what to scale the values by."""
    _, total, a, _ = fold_weights(m, load_splat_f32(sink), l, splat_f32(1.0))
    return total, a


@jit
def _fold_parts(tile, step, n_parts, lane, n, k_room, room):
    """Query `lane` of a tile of n, whose parts lie `step` bytes apart, folded into the first.

    Returns where its state is, its m and its l.
    """
    o, tops = tile + 4 * (n * k_room + lane * room), tile + 4 * n * (k_room + 2 * room) + 4 * lane
    m, l = load_splat_f32(tops), load_splat_f32(tops + 32)  # noqa: E741
    for part in range(1, n_parts):
        at = part * step
        m, l, a, b = fold_weights(  # noqa: E741
            m, load_splat_f32(tops + at), l, load_splat_f32(tops + at + 32)
        )
        for d in range(0, 4 * room, 32):
            scaled = mul_f(load_f32x8(o + at + d), b)
            store_f32x8(o + d, fma(load_f32x8(o + d), a, scaled))
    return o, m, l


@jit
def _write(o, factor, inverse, v_dim, out):
    n_whole = v_dim & -8
    for d in range(0, 4 * n_whole, 32):
        store_f32x8(out + d, mul_f(mul_f(load_f32x8(o + d), factor), inverse))
    if n_whole < v_dim:
        store_f32x8(o, mul_f(mul_f(load_f32x8(o + 4 * n_whole), factor), inverse))
        copy(o, out + 4 * n_whole, v_dim - n_whole)


@jit
def _keep(x, n):
    pass


def make(isa, *features):
    with_sink = _with_sink if "sinks" in features else _no_sink
    transform = hadamard if "hadamard" in features else _keep

    def kernel(h, a, chunk, thread):
        k_room, room = word(a + ATTEND_K_ROOM), word(a + ATTEND_V_ROOM)
        n_heads, v_dim = word(a + ATTEND_N_HEADS), word(a + ATTEND_V_DIM)
        size = _query_bytes(k_room, room)
        group = n_heads // word(a + ATTEND_N_KV_HEADS)
        record = word(a + ATTEND_ITEMS) + ITEMS_ROWS + ROW_BYTES * chunk
        n_rows, index = word(record + ROW_ITEM_ROWS), word(record + ROW_INDEX)
        parts = word(a + ATTEND_PARTS) + word(record + ROW_PART) * n_heads * size
        step, n_queries, sink = n_rows * n_heads * size, n_rows * group, a + FOLD_SINK
        out = row_at(sink, chunk, thread)
        for head in range(n_heads):
            query = index * group + head % group
            start, n = tile_of(query, n_queries)
            tile = parts + (head // group * n_queries + start) * size
            o, m, l = _fold_parts(  # noqa: E741
                tile, step, word(record + ROW_N_PARTS), query - start, n, k_room, room
            )
            total, factor = with_sink(m, l, word(a + ATTEND_SINKS) + 4 * head)
            inverse = div_f(splat_f32(1.0), total)
            _write(o, factor, inverse, v_dim, out + 4 * head * v_dim)
            transform(out + 4 * head * v_dim, v_dim)
        finish_row(out, n_heads * v_dim, sink, chunk, word(h + H_ROWS))

    return kernel
