"""Sorts the rows of a step by the experts that they have chosen. Knows no weights."""

from __future__ import annotations

import numpy as np
from numba import njit

from edgeinfer.kernels.cpu.layout import (
    DISPATCH_EXPERT,
    DISPATCH_FIRST,
    DISPATCH_ITEM_BYTES,
    DISPATCH_ITEMS,
    DISPATCH_N_EXPERTS,
    DISPATCH_N_ROWS,
    DISPATCH_N_USED,
    DISPATCH_OUT,
    DISPATCH_RECORD_BYTES,
    DISPATCH_ROUTE,
    DISPATCH_ROW,
    DISPATCH_SLOT,
    DISPATCH_STRIDE,
    H_ROWS,
    WORD,
    dispatch_records,
)
from edgeinfer.kernels.cpu.native.words import load_f32, set_word, word

jit = njit(error_model="numpy")
_dispatch_records = jit(dispatch_records)


@jit
def _expert(route, stride, row, slot):
    """The number that a route has in a place."""
    return np.int64(load_f32(route + row * stride + 4 * slot))


@jit
def _write_items(out, counts, n_experts):
    """An item for each expert with rows; its count becomes the number of its first record."""
    n_items, first = 0, 0
    for expert in range(n_experts):
        n = word(counts + WORD * expert)
        set_word(counts + WORD * expert, first)
        if n > 0:
            item = out + DISPATCH_ITEMS + DISPATCH_ITEM_BYTES * n_items
            set_word(item + DISPATCH_EXPERT, expert)
            set_word(item + DISPATCH_FIRST, first)
            set_word(item + DISPATCH_N_ROWS, n)
            n_items += 1
            first += n
    set_word(out, n_items)


def make(isa):
    def kernel(h, a, chunk, thread):
        n_rows, n_used = word(h + H_ROWS), word(a + DISPATCH_N_USED)
        out, n_experts = word(a + DISPATCH_OUT), word(a + DISPATCH_N_EXPERTS)
        route, stride = word(a + DISPATCH_ROUTE), word(a + DISPATCH_STRIDE)
        records = out + _dispatch_records(n_experts)
        counts = records + DISPATCH_RECORD_BYTES * n_rows * n_used
        for expert in range(n_experts):
            set_word(counts + WORD * expert, 0)
        for row in range(n_rows):
            for slot in range(n_used):
                at = counts + WORD * _expert(route, stride, row, slot)
                set_word(at, word(at) + 1)
        _write_items(out, counts, n_experts)
        for row in range(n_rows):
            for slot in range(n_used):
                at = counts + WORD * _expert(route, stride, row, slot)
                record = records + DISPATCH_RECORD_BYTES * word(at)
                set_word(record + DISPATCH_ROW, row)
                set_word(record + DISPATCH_SLOT, slot)
                set_word(at, word(at) + 1)

    return kernel
