"""Page tables as kernels see them: `batch.PageTable` over the step header.

Knows no attention.
"""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.layout import (
    H_POS,
    H_SEQ,
    H_TABLES,
    PAGE,
    TABLE_BYTES,
    TABLE_PAGES,
    TABLE_PINNED,
    TABLE_SLOTS,
    TABLE_VISIBLE,
)
from edgeinfer.kernels.cpu.native.words import load_i32, word

jit = njit(error_model="numpy")


@jit
def position(h, t):
    """Absolute position of row t."""
    return word(word(h + H_POS) + 8 * t)


@jit
def table_of(h, tables, t):
    """The page table of row t's sequence, of those that begin at an offset."""
    return word(h + H_TABLES) + tables + TABLE_BYTES * load_i32(word(h + H_SEQ) + 4 * t)


@jit
def arena_page(table, page):
    """The page of the arena that holds absolute page `page`."""
    pinned = word(table + TABLE_PINNED)
    slot = page
    if page >= pinned:
        slot = pinned + (page - pinned) % (word(table + TABLE_SLOTS) - pinned)
    return load_i32(word(table + TABLE_PAGES) + 4 * slot)


@jit
def first_ring_page(table, page):
    """The oldest unpinned absolute page that a query on absolute page `page` sees."""
    return max(word(table + TABLE_PINNED), page - word(table + TABLE_VISIBLE) + 1)


@jit
def n_gone(table, page):
    """How many pages between the pinned ones and the ring a query on `page` no longer sees."""
    return first_ring_page(table, page) - word(table + TABLE_PINNED)


@jit
def pinned_position(table, pos):
    """PageTable.pinned_pos."""
    return pos - PAGE * n_gone(table, pos // PAGE)


@jit
def first_seen(table, pos, window):
    """The first position that a window leaves to a query at `pos`, counted inside the cache.

    Below 0 where it leaves all. Inside the cache there is no gap behind the pinned pages.
    """
    return pinned_position(table, pos) - window + 1


@jit
def pages_passed(table, pos, window):
    """How many pages of its cache a query at `pos` no longer sees for a window; 0 is none."""
    return max(first_seen(table, pos, window), 0) // PAGE if window > 0 else 0
