"""gather.<layout>: brings the rows together that meet the same expert. Knows no weights."""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.layout import (
    A32_BYTES,
    DISPATCH_FIRST,
    DISPATCH_ITEM_BYTES,
    DISPATCH_ITEMS,
    DISPATCH_N_ROWS,
    DISPATCH_RECORD_BYTES,
    DISPATCH_ROW,
    DISPATCH_SLOT,
    GATHER_DIM,
    GATHER_N_PARTS,
    GATHER_OUT,
    GATHER_STRIDE,
    GATHER_X,
    H_ROWS,
    PLANNED_AT,
    PLANNED_N_EXPERTS,
    dispatch_records,
    whole_vectors,
)
from edgeinfer.kernels.cpu.native.copy_rows import copy
from edgeinfer.kernels.cpu.native.operations import load_i32x8, store_i32x8
from edgeinfer.kernels.cpu.native.sink import clear_behind, tile_of
from edgeinfer.kernels.cpu.native.words import word

jit = njit(error_model="numpy")
_dispatch_records = jit(dispatch_records)
_whole_vectors = jit(whole_vectors)


@jit
def _copy_block(source, to):
    """44 bytes, as two vectors that overlap."""
    first, last = load_i32x8(source), load_i32x8(source + A32_BYTES - 32)
    store_i32x8(to, first)
    store_i32x8(to + A32_BYTES - 32, last)


@jit
def _blocks(h, a, row, slot, out, i, n):
    """Row i of an item of n, in its place among the blocks of its tile."""
    n_blocks, n_parts = word(a + GATHER_DIM) // 32, word(a + GATHER_N_PARTS)
    start, size = tile_of(row, word(h + H_ROWS))
    x = word(a + GATHER_X) + A32_BYTES * (start * n_parts * n_blocks + row - start)
    x += A32_BYTES * size * n_blocks * (slot if n_parts > 1 else 0)
    to_start, to_size = tile_of(i, n)
    to = out + A32_BYTES * (to_start * n_blocks + i - to_start)
    for _ in range(n_blocks):
        _copy_block(x, to)
        x += A32_BYTES * size
        to += A32_BYTES * to_size


@jit
def _floats(h, a, row, slot, out, i, n):
    """Likewise, in its row."""
    dim = word(a + GATHER_DIM)
    x = word(a + GATHER_X) + row * word(a + GATHER_STRIDE)
    x += 4 * dim * (slot if word(a + GATHER_N_PARTS) > 1 else 0)
    to = out + 4 * _whole_vectors(dim) * i
    copy(x, to, dim)
    clear_behind(to, dim)


def make(isa, layout):
    one_row = _blocks if layout == "a32" else _floats
    is_a32 = layout == "a32"

    def kernel(h, a, chunk, thread):
        plan, dim = word(a + PLANNED_AT), word(a + GATHER_DIM)
        item = plan + DISPATCH_ITEMS + DISPATCH_ITEM_BYTES * chunk
        first, n = word(item + DISPATCH_FIRST), word(item + DISPATCH_N_ROWS)
        row_bytes = dim // 32 * A32_BYTES if is_a32 else 4 * _whole_vectors(dim)
        record = (
            plan + _dispatch_records(word(a + PLANNED_N_EXPERTS)) + DISPATCH_RECORD_BYTES * first
        )
        out = word(a + GATHER_OUT) + first * row_bytes
        for i in range(n):
            one_row(h, a, word(record + DISPATCH_ROW), word(record + DISPATCH_SLOT), out, i, n)
            record += DISPATCH_RECORD_BYTES

    return kernel
