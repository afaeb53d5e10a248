"""Attention of one work item over the pages its rows see, for the query heads of one kv head.

Knows no activations' formats. The order of additions is part of the numerics: each page by
itself, pages folded inside a segment, segments folded.
"""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.layout import (
    ALL_SEGMENTS,
    ATTEND_CAP,
    ATTEND_ITEMS,
    ATTEND_K_BASE,
    ATTEND_K_PAGE_BYTES,
    ATTEND_N_HEADS,
    ATTEND_N_KV_HEADS,
    ATTEND_PARTS,
    ATTEND_PINNED_Q,
    ATTEND_Q,
    ATTEND_Q_STRIDE,
    ATTEND_SCALE,
    ATTEND_TABLES,
    ATTEND_V_BASE,
    ATTEND_V_PAGE_BYTES,
    ATTEND_VALUES,
    ATTEND_WINDOW,
    H_ROWS,
    ITEM_BYTES,
    ITEM_N_ROWS,
    ITEM_PART,
    ITEM_ROW,
    ITEM_SEGMENT,
    ITEMS_ROWS,
    K_ROW_BYTES,
    KV_BYTES,
    MAX_QUERIES,
    PAGE,
    ROW_BYTES,
    SEGMENT_PAGES,
    head_page_bytes,
    query_bytes,
    values_bytes,
    whole_vectors,
)
from edgeinfer.kernels.cpu.native.activations import tanh
from edgeinfer.kernels.cpu.native.attention import (
    fold_weights,
    grid,
    max_rows,
    n_segments,
    pinned_end,
    pinned_start,
    ring_start,
    segment,
    sum_rows,
    tile_of,
)
from edgeinfer.kernels.cpu.native.math import exp
from edgeinfer.kernels.cpu.native.pages import (
    arena_page,
    first_seen,
    n_gone,
    pages_passed,
    position,
    table_of,
)
from edgeinfer.kernels.cpu.native.simd import (
    add_f,
    div_f,
    fma,
    load_f32x8,
    load_rows_f32,
    load_splat_f32,
    local,
    max_f,
    mul_f,
    prefetch,
    row,
    splat_f32,
    store_f32x8,
    store_rows,
    sub_f,
    zeros_f32,
)
from edgeinfer.kernels.cpu.native.words import (
    load_f16,
    load_f32,
    load_i32,
    store_f16,
    store_f32,
    store_i32,
    word,
)

jit = njit(error_model="numpy")

_VECTOR = 8 * KV_BYTES
_ROW = 4 * PAGE  # bytes of one query's scores in a page
# Local memory: scores, a vector of sums for each query, the maxima, fold weights, bounds, then
# of windows and soft-caps the first positions, that of an item's first row, and the cap.
_SUMS = MAX_QUERIES * _ROW
_MAXIMA = _SUMS + MAX_QUERIES * 32
_WEIGHTS = _MAXIMA + 32
_PART_WEIGHTS = _WEIGHTS + 32
_BOUNDS = _PART_WEIGHTS + 32
_LOWS = _BOUNDS + 32
_FIRST, _CAP = _LOWS + 32, _LOWS + 36
_LOCAL_BYTES = _LOWS + 64
_INVISIBLE = float("-inf")


def _widest(n, n_vectors, n_sums):
    """How many vectors beside each other for n queries: a divisor of n_vectors."""
    top = max(1, n_sums // n)
    return max(w for w in range(1, top + 1) if n_vectors % w == 0)


def _page_of(n, k_dim, v_dim, n_sums, features):
    """Attention of a tile of n queries over one page, `n_sums` vectors of sums at a time.

    v_dim is a multiple of 8.
    """
    k_wide, v_wide = _widest(n, 4, n_sums), _widest(n, v_dim // 8, n_sums)
    k_multiply, _, _, k_store, _ = grid(n, k_wide)
    _, _, _, v_store, v_fold = grid(n, v_wide)
    is_windowed = "window" in features
    hide = _hide_outside if is_windowed else _hide
    cap_scores = _cap_scores if "cap" in features else _keep_scores
    add_values = _values_of(n, v_dim, v_wide, is_windowed)
    k_sums, v_sums = n * k_wide, n * v_wide
    o_stride, state = 4 * v_dim, 4 * n * k_dim
    tops = state + 8 * n * v_dim  # m and l of the first state, then of the second

    @jit
    def page(tile, second, starts, k, v, next_k, next_v, scale, s, common, last):
        """One page into a state; all n see `common` positions of it, the last query `last`."""
        for first in range(0, (last + 7) // 8, k_wide):
            columns, soon = k + _VECTOR * first, next_k + _VECTOR * first * k_dim
            acc = zeros_f32(k_sums)
            for j in range(k_dim):
                prefetch(soon + _VECTOR * k_wide * j)
                acc = k_multiply(acc, tile + 4 * n * j, 4, columns + K_ROW_BYTES * j)
            k_store(s + 32 * first, _ROW, mul_f(acc, splat_f32(scale)))
        cap_scores(s, n)
        hide(s, n, common)
        v0, v1 = load_rows_f32(s, _ROW, n), load_rows_f32(s + 32, _ROW, n)
        v2, v3 = load_rows_f32(s + 64, _ROW, n), load_rows_f32(s + 96, _ROW, n)
        m = max_rows(max_f(max_f(v0, v1), max_f(v2, v3)))
        _soften(s, m, n)
        _update(tile + tops + 64 * second, m, sum_rows(load_rows_f32(s + _SUMS, 32, n)), s, starts)
        o = tile + state + second * n * o_stride
        for d in range(0, v_dim, 8 * v_wide):
            column, soon = v + KV_BYTES * d, next_v + PAGE * KV_BYTES * d
            acc = add_values(zeros_f32(v_sums), s, column, soon, common, last)
            if starts:
                v_store(o + 4 * d, o_stride, acc)
            else:
                v_fold(o + 4 * d, o_stride, acc, s + _WEIGHTS, s + _PART_WEIGHTS)

    return page


def _values_of(n, v_dim, wide, is_windowed):
    """Sums of V at a column, times the scores, over what each of n queries sees of a page."""
    multiply, multiply_visible, multiply_between, _, _ = grid(n, wide)
    v_row = KV_BYTES * v_dim

    @jit
    def up_to_bounds(acc, s, column, soon, common, last):
        for pos in range(common):
            prefetch(soon + _VECTOR * wide * pos)
            acc = multiply(acc, s + 4 * pos, _ROW, column + v_row * pos)
        for pos in range(common, last):
            p, seen = s + 4 * pos, column + v_row * pos
            acc = multiply_visible(acc, p, _ROW, seen, s + _BOUNDS, pos)
        return acc

    @jit
    def between(acc, s, column, first, end):
        for pos in range(first, end):
            p, seen = s + 4 * pos, column + v_row * pos
            acc = multiply_between(acc, p, _ROW, seen, s + _BOUNDS, pos, s + _LOWS)
        return acc

    @jit
    def within_bounds(acc, s, column, soon, common, last):
        first, all_begun = _low(s, 0), _low(s, n - 1)
        acc = between(acc, s, column, first, all_begun)
        for pos in range(all_begun, common):
            prefetch(soon + _VECTOR * wide * pos)
            acc = multiply(acc, s + 4 * pos, _ROW, column + v_row * pos)
        return between(acc, s, column, max(all_begun, common), last)

    return within_bounds if is_windowed else up_to_bounds


@jit
def _hide(s, n, common):
    """The scores of what each query must not see."""
    if common < PAGE:
        for i in range(n):
            for pos in range(_bound(s, i), PAGE):
                store_f32(s + _ROW * i + 4 * pos, _INVISIBLE)


@jit
def _hide_outside(s, n, common):
    _hide(s, n, common)
    for i in range(n):
        for pos in range(_low(s, i)):
            store_f32(s + _ROW * i + 4 * pos, _INVISIBLE)


@jit
def _keep_scores(s, n):
    pass


@jit
def _cap_scores(s, n):
    """SoftCap of every score."""
    cap = load_splat_f32(s + _CAP)
    for at in range(s, s + _ROW * n, 32):
        store_f32x8(at, mul_f(tanh(div_f(load_f32x8(at), cap)), cap))


@jit
def _soften(s, m, n):
    """Scores to p, in place, and the vectors whose lanes sum to l."""
    store_f32x8(s + _MAXIMA, m)
    for i in range(n):
        at = s + _ROW * i
        p = exp(sub_f(load_rows_f32(at, 32, 4), load_splat_f32(s + _MAXIMA + 4 * i)))
        store_rows(at, 32, p)
        total = add_f(add_f(row(p, 0), row(p, 1)), add_f(row(p, 2), row(p, 3)))
        store_f32x8(s + _SUMS + 32 * i, total)


@jit
def _update(at, m, l, s, starts):  # noqa: E741
    """m and l of a page or segment into the state's."""
    if not starts:
        m, l, a, b = fold_weights(load_f32x8(at), m, load_f32x8(at + 32), l)  # noqa: E741
        store_f32x8(s + _WEIGHTS, a)
        store_f32x8(s + _PART_WEIGHTS, b)
    store_f32x8(at, m)
    store_f32x8(at + 32, l)


@jit
def _fold_segment(tile, n, k_dim, v_dim, s):
    """The second state of a tile into the first."""
    o, size = tile + 4 * n * k_dim, 4 * n * v_dim
    tops = o + 2 * size
    _update(tops, load_f32x8(tops + 64), load_f32x8(tops + 96), s, False)
    for i in range(n):
        a, b = load_splat_f32(s + _WEIGHTS + 4 * i), load_splat_f32(s + _PART_WEIGHTS + 4 * i)
        for d in range(4 * i * v_dim, 4 * (i + 1) * v_dim, 32):
            part = mul_f(load_f32x8(o + size + d), b)
            store_f32x8(o + d, fma(load_f32x8(o + d), a, part))


@jit
def _bound(s, i):
    return load_i32(s + _BOUNDS + 4 * i)


@jit
def _low(s, i):
    return load_i32(s + _LOWS + 4 * i)


@jit
def _gather(q, stride, group, k_dim, n_queries, region, size):
    """Copy the queries of an item, row by row, into their tiles."""
    for i in range(n_queries):
        start, n = tile_of(i, n_queries)
        src = q + i // group * stride + i % group * k_dim * 4
        dst = region + start * size + 4 * (i - start)
        for j in range(k_dim):
            store_f32(dst + 4 * n * j, load_f32(src + 4 * j))


@jit
def _set_bounds(s, start, n, group, first_bound):
    for i in range(n):
        store_i32(s + _BOUNDS + 4 * i, first_bound + (start + i) // group)


@jit
def _set_lows(s, start, n, group, first_bound):
    """Both bounds of every query."""
    _set_bounds(s, start, n, group, first_bound)
    for i in range(n):
        low = load_i32(s + _FIRST) + (start + i) // group
        store_i32(s + _LOWS + 4 * i, max(low, 0))


@jit
def _set_nothing(s, start, n, group, first_bound):
    pass


@jit
def _visible(page, n_pinned, ring):
    """The first visible page from `page` on."""
    return ring if n_pinned <= page < ring else page


def _values_in(k_dim, v_dim, are_shared):
    """`values_in(k, v, scratch)`: where a page's values are; of K, turned, where that serves."""
    n = min(k_dim, v_dim)

    @jit
    def own(k, v, scratch):
        return v

    @jit
    def turned(k, v, scratch):
        for d in range(n):
            for pos in range(PAGE):
                half = load_f16(k + K_ROW_BYTES * d + KV_BYTES * pos)
                store_f16(scratch + KV_BYTES * (v_dim * pos + d), half)
        return scratch

    return turned if are_shared else own


@jit
def _all_seen(a, table, pos):
    return 0, 0


@jit
def _window_seen(a, table, pos):
    """How many pages of the cache a row's window has passed, and its first position on the next."""
    window = word(a + ATTEND_WINDOW)
    n_passed = pages_passed(table, pos, window)
    return n_passed, first_seen(table, pos, window) - PAGE * n_passed


def make(isa, k_dim, v_dim, *features):
    k_dim, v_dim = int(k_dim), whole_vectors(int(v_dim))
    size, n_sums = query_bytes(k_dim, v_dim), isa.registers // 2
    k_head_bytes, v_head_bytes = head_page_bytes(k_dim, v_dim)
    page_4, page_3, page_2, page_1 = (
        _page_of(n, k_dim, v_dim, n_sums, features) for n in (4, 3, 2, 1)
    )
    values_in, n_value_bytes = _values_in(k_dim, v_dim, "shared" in features), values_bytes(v_dim)
    scratch = local(_LOCAL_BYTES)
    is_windowed = "window" in features
    set_lows = _set_lows if is_windowed else _set_nothing
    seen_of = _window_seen if is_windowed else _all_seen

    @jit
    def one_page(
        region, n_queries, group, second, starts, k, v, next_k, next_v, scale, s, first_bound
    ):
        start = 0
        while start < n_queries:
            _, n = tile_of(start, n_queries)
            tile, common, last = region + start * size, PAGE, PAGE
            if first_bound < PAGE:
                _set_bounds(s, start, n, group, first_bound)
                common, last = _bound(s, 0), _bound(s, n - 1)
            set_lows(s, start, n, group, first_bound)
            if n == 4:
                page_4(tile, second, starts, k, v, next_k, next_v, scale, s, common, last)
            elif n == 3:
                page_3(tile, second, starts, k, v, next_k, next_v, scale, s, common, last)
            elif n == 2:
                page_2(tile, second, starts, k, v, next_k, next_v, scale, s, common, last)
            else:
                page_1(tile, second, starts, k, v, next_k, next_v, scale, s, common, last)
            start += n

    @jit
    def fold_segments(region, n_queries, s):
        start = 0
        while start < n_queries:
            _, n = tile_of(start, n_queries)
            _fold_segment(region + start * size, n, k_dim, v_dim, s)
            start += n

    def kernel(h, a, chunk, thread):
        s, n_kv_heads = scratch(), word(a + ATTEND_N_KV_HEADS)
        n_heads, head = word(a + ATTEND_N_HEADS), chunk % n_kv_heads
        group = n_heads // n_kv_heads
        item = word(a + ATTEND_ITEMS) + ITEMS_ROWS + ROW_BYTES * word(h + H_ROWS)
        item += ITEM_BYTES * (chunk // n_kv_heads)
        t, n_rows = word(item + ITEM_ROW), word(item + ITEM_N_ROWS)
        n_queries = n_rows * group
        region = word(a + ATTEND_PARTS)
        region += (word(item + ITEM_PART) * n_heads + head * n_queries) * size
        stride, scale = word(a + ATTEND_Q_STRIDE), load_f32(a + ATTEND_SCALE)
        offset = t * stride + head * group * k_dim * 4
        k_base = word(a + ATTEND_K_BASE) + head * k_head_bytes
        v_base = word(a + ATTEND_V_BASE) + head * v_head_bytes
        pos, table = position(h, t), table_of(h, word(a + ATTEND_TABLES), t)
        last_page = pos // PAGE
        n_passed, low = seen_of(a, table, pos)
        n_pinned, ring = pinned_end(table, last_page), ring_start(table, last_page, n_passed)
        begin = _visible(pinned_start(table, last_page, n_passed), n_pinned, ring)
        has_slid, source = n_gone(table, last_page) > 0, -1
        store_f32(s + _CAP, load_f32(a + ATTEND_CAP))
        end = n_segments(table, last_page, n_passed)
        if word(item + ITEM_SEGMENT) != ALL_SEGMENTS:
            end = 1
        k_bytes, v_bytes = word(a + ATTEND_K_PAGE_BYTES), word(a + ATTEND_V_PAGE_BYTES)
        values = word(a + ATTEND_VALUES) + thread * n_value_bytes
        for i in range(end):
            which = word(item + ITEM_SEGMENT)
            if which == ALL_SEGMENTS:
                which = segment(table, last_page, n_passed, i)
            starts, p = True, _visible(max(SEGMENT_PAGES * which, begin), n_pinned, ring)
            limit = min(SEGMENT_PAGES * (which + 1), last_page + 1)
            slot = arena_page(table, p)
            while p < limit:
                wanted = ATTEND_PINNED_Q if has_slid and p < n_pinned else ATTEND_Q
                if wanted != source:
                    q = word(a + wanted) + offset
                    _gather(q, stride, group, k_dim, n_queries, region, size)
                    source = wanted
                k, v = k_base + slot * k_bytes, v_base + slot * v_bytes
                bound = pos % PAGE + 1 if p == last_page else PAGE
                store_i32(s + _FIRST, low if p == begin else -PAGE)
                p = _visible(p + 1, n_pinned, ring)
                if p < limit:
                    slot = arena_page(table, p)
                next_k, next_v = k_base + slot * k_bytes, v_base + slot * v_bytes
                v = values_in(k, v, values)
                one_page(
                    region, n_queries, group, i > 0, starts, k, v, next_k, next_v, scale, s, bound
                )
                starts = False
            if i > 0:
                fold_segments(region, n_queries, s)

    return kernel
