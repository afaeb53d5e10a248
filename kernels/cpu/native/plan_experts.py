"""Sorts the rows of a step by the experts that they have chosen. Knows no weights."""

from __future__ import annotations

import numpy as np
from numba import njit

from edgeinfer.kernels.cpu.layout import (
    H_ROWS,
    PLAN_AT,
    PLAN_EXPERT,
    PLAN_FIRST,
    PLAN_ITEM_BYTES,
    PLAN_ITEMS,
    PLAN_N_EXPERTS,
    PLAN_N_ROWS,
    PLAN_N_USED,
    PLAN_RECORD_BYTES,
    PLAN_ROUTE,
    PLAN_ROW,
    PLAN_SLOT,
    PLAN_STRIDE,
    WORD,
    plan_records,
)
from edgeinfer.kernels.cpu.native.simd import load_f32, set_word, word

jit = njit(error_model="numpy")
_plan_records = jit(plan_records)


@jit
def _expert(route, stride, row, slot):
    """The number that a route has in a place."""
    return np.int64(load_f32(route + row * stride + 4 * slot))


@jit
def _write_items(plan, counts, n_experts):
    """An item for each expert with rows; its count becomes the number of its first record."""
    n_items, first = 0, 0
    for expert in range(n_experts):
        n = word(counts + WORD * expert)
        set_word(counts + WORD * expert, first)
        if n > 0:
            item = plan + PLAN_ITEMS + PLAN_ITEM_BYTES * n_items
            set_word(item + PLAN_EXPERT, expert)
            set_word(item + PLAN_FIRST, first)
            set_word(item + PLAN_N_ROWS, n)
            n_items += 1
            first += n
    set_word(plan, n_items)


def make(isa):
    def kernel(h, a, chunk, thread):
        n_rows, n_used, n_experts = (
            word(h + H_ROWS),
            word(a + PLAN_N_USED),
            word(a + PLAN_N_EXPERTS),
        )
        plan, route, stride = word(a + PLAN_AT), word(a + PLAN_ROUTE), word(a + PLAN_STRIDE)
        records = plan + _plan_records(n_experts)
        counts = records + PLAN_RECORD_BYTES * n_rows * n_used
        for expert in range(n_experts):
            set_word(counts + WORD * expert, 0)
        for row in range(n_rows):
            for slot in range(n_used):
                at = counts + WORD * _expert(route, stride, row, slot)
                set_word(at, word(at) + 1)
        _write_items(plan, counts, n_experts)
        for row in range(n_rows):
            for slot in range(n_used):
                at = counts + WORD * _expert(route, stride, row, slot)
                record = records + PLAN_RECORD_BYTES * word(at)
                set_word(record + PLAN_ROW, row)
                set_word(record + PLAN_SLOT, slot)
                set_word(at, word(at) + 1)

    return kernel
