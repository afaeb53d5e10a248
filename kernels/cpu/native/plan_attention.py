"""Cuts a step's rows into attention work items. Knows no heads and no K or V."""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.attention_layout import (
    ALL_SEGMENTS,
    ATTEND_FEW_ROWS,
    ATTEND_ROWS,
    ITEM_BYTES,
    ITEM_N_ROWS,
    ITEM_PART,
    ITEM_ROW,
    ITEM_SEGMENT,
    ITEMS_AT,
    ITEMS_MAX_SEGMENTS,
    ITEMS_ROWS,
    ITEMS_TABLES,
    ITEMS_WINDOW,
    ROW_BYTES,
    ROW_INDEX,
    ROW_ITEM_ROWS,
    ROW_N_PARTS,
    ROW_PART,
    SPLIT_ROWS,
)
from edgeinfer.kernels.cpu.layout import H_ROWS, H_SEQ, PAGE
from edgeinfer.kernels.cpu.native.attention import n_segments, segment
from edgeinfer.kernels.cpu.native.pages import pages_passed, position, table_of
from edgeinfer.kernels.cpu.native.words import load_i32, set_word, word

jit = njit(error_model="numpy")


@jit
def _first_row(h, table, last, most, window):
    """First row of the work item that ends with row `last`: `most` positions are a block."""
    seqs, row = word(h + H_SEQ), last
    block, n_passed = position(h, last) // most, pages_passed(table, position(h, last), window)
    while row > 0 and load_i32(seqs + 4 * (row - 1)) == load_i32(seqs + 4 * last):
        pos = position(h, row - 1)
        if pos // most != block or pages_passed(table, pos, window) != n_passed:
            break
        row -= 1
    return row


@jit
def _write_item(item, row, n_rows, which, part):
    set_word(item + ITEM_ROW, row)
    set_word(item + ITEM_N_ROWS, n_rows)
    set_word(item + ITEM_SEGMENT, which)
    set_word(item + ITEM_PART, part)


@jit
def _write_rows(at, row, n_rows, part, n_parts):
    for i in range(n_rows):
        record = at + ITEMS_ROWS + ROW_BYTES * (row + i)
        set_word(record + ROW_PART, part)
        set_word(record + ROW_ITEM_ROWS, n_rows)
        set_word(record + ROW_INDEX, i)
        set_word(record + ROW_N_PARTS, n_parts)


def make(isa):
    def kernel(h, a, chunk, thread):
        at, window, tables = word(a + ITEMS_AT), word(a + ITEMS_WINDOW), word(a + ITEMS_TABLES)
        end, part, n_items = word(h + H_ROWS), 0, 0
        items = at + ITEMS_ROWS + ROW_BYTES * end
        spare = SPLIT_ROWS * word(a + ITEMS_MAX_SEGMENTS)
        most = ATTEND_ROWS if end > SPLIT_ROWS else ATTEND_FEW_ROWS
        # The last rows see most: starting with them leaves the small items for the end.
        while end > 0:
            table = table_of(h, tables, end - 1)
            row = _first_row(h, table, end - 1, most, window)
            n_rows, page = end - row, position(h, row) // PAGE
            n_passed = pages_passed(table, position(h, row), window)
            n_parts, n = 1, n_segments(table, page, n_passed)
            if n_rows <= SPLIT_ROWS and n_rows * (n - 1) <= spare:
                n_parts = n
                spare -= n_rows * (n - 1)
            _write_rows(at, row, n_rows, part, n_parts)
            for i in range(n_parts):
                which = ALL_SEGMENTS if n_parts < n else segment(table, page, n_passed, i)
                _write_item(items + ITEM_BYTES * n_items, row, n_rows, which, part)
                n_items += 1
                part += n_rows
            end = row
        set_word(at, n_items)

    return kernel
