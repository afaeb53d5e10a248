"""Attention of one work item over the pages its rows see, for the query heads of one kv head.

Knows no activations' formats. The order of additions is part of the numerics: each page by
itself, pages folded inside a segment, segments folded.
"""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.attention_layout import (
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
    ITEM_BYTES,
    ITEM_N_ROWS,
    ITEM_PART,
    ITEM_ROW,
    ITEM_SEGMENT,
    ITEMS_ROWS,
    ROW_BYTES,
    query_bytes,
)
from edgeinfer.kernels.cpu.layout import H_ROWS, PAGE, SEGMENT_PAGES
from edgeinfer.kernels.cpu.native.activations import tanh
from edgeinfer.kernels.cpu.native.attend_kv import (
    BOUNDS,
    CAP,
    FIRST,
    LOCAL_BYTES,
    LOWS,
    MAXIMA,
    PART_WEIGHTS,
    ROW,
    SUMS,
    WEIGHTS,
    bound,
    low,
    own_values,
    queries_of,
    scores_of,
    shared_values,
    values_of,
)
from edgeinfer.kernels.cpu.native.attention import (
    fold_weights,
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
from edgeinfer.kernels.cpu.native.operations import (
    add_f,
    div_f,
    fma,
    load_f32x8,
    load_rows_f32,
    load_splat_f32,
    local,
    max_f,
    mul_f,
    row,
    store_f32x8,
    store_rows,
    sub_f,
)
from edgeinfer.kernels.cpu.native.pages import (
    arena_page,
    first_seen,
    n_gone,
    pages_passed,
    position,
    table_of,
)
from edgeinfer.kernels.cpu.native.words import (
    load_f32,
    load_i32,
    store_f32,
    store_i32,
    word,
)
from edgeinfer.kernels.cpu.page_layout import k_bytes as k_bytes_of
from edgeinfer.kernels.cpu.page_layout import k_room, v_room
from edgeinfer.kernels.cpu.page_layout import v_bytes as v_bytes_of

jit = njit(error_model="numpy")

_INVISIBLE = float("-inf")


def _page_of(isa, n, k_dim, v_dim, kinds, features):
    """Attention of a tile of n queries over one page."""
    is_windowed = "window" in features
    k_kind, v_kind = kinds
    scores = scores_of(isa, n, k_dim, k_kind)
    add_values = values_of(n, v_dim, v_kind, isa.registers, is_windowed)
    hide = _hide_outside if is_windowed else _hide
    cap_scores = _cap_scores if "cap" in features else _keep_scores
    room = v_room(v_dim, v_kind)
    state = 4 * n * k_room(k_dim, k_kind)
    tops = state + 8 * n * room  # m and l of the first state, then of the second

    @jit
    def page(tile, second, starts, k, v, next_k, next_v, scale, s, common, last):
        """One page into a state; all n see `common` positions of it, the last query `last`."""
        scores(tile, k, next_k, scale, s, last)
        cap_scores(s, n)
        hide(s, n, common)
        v0, v1 = load_rows_f32(s, ROW, n), load_rows_f32(s + 32, ROW, n)
        v2, v3 = load_rows_f32(s + 64, ROW, n), load_rows_f32(s + 96, ROW, n)
        m = max_rows(max_f(max_f(v0, v1), max_f(v2, v3)))
        _soften(s, m, n)
        _update(tile + tops + 64 * second, m, sum_rows(load_rows_f32(s + SUMS, 32, n)), s, starts)
        o = tile + state + second * n * 4 * room
        add_values(o, v, next_v, starts, s, common, last)

    return page


@jit
def _hide(s, n, common):
    """The scores of what each query must not see."""
    if common < PAGE:
        for i in range(n):
            for pos in range(bound(s, i), PAGE):
                store_f32(s + ROW * i + 4 * pos, _INVISIBLE)


@jit
def _hide_outside(s, n, common):
    _hide(s, n, common)
    for i in range(n):
        for pos in range(low(s, i)):
            store_f32(s + ROW * i + 4 * pos, _INVISIBLE)


@jit
def _keep_scores(s, n):
    pass


@jit
def _cap_scores(s, n):
    """SoftCap of every score."""
    cap = load_splat_f32(s + CAP)
    for at in range(s, s + ROW * n, 32):
        store_f32x8(at, mul_f(tanh(div_f(load_f32x8(at), cap)), cap))


@jit
def _soften(s, m, n):
    """Scores to p, in place, and the vectors whose lanes sum to l."""
    store_f32x8(s + MAXIMA, m)
    for i in range(n):
        at = s + ROW * i
        p = exp(sub_f(load_rows_f32(at, 32, 4), load_splat_f32(s + MAXIMA + 4 * i)))
        store_rows(at, 32, p)
        total = add_f(add_f(row(p, 0), row(p, 1)), add_f(row(p, 2), row(p, 3)))
        store_f32x8(s + SUMS + 32 * i, total)


@jit
def _update(at, m, l, s, starts):  # noqa: E741
    """m and l of a page or segment into the state's."""
    if not starts:
        m, l, a, b = fold_weights(load_f32x8(at), m, load_f32x8(at + 32), l)  # noqa: E741
        store_f32x8(s + WEIGHTS, a)
        store_f32x8(s + PART_WEIGHTS, b)
    store_f32x8(at, m)
    store_f32x8(at + 32, l)


@jit
def _fold_segment(tile, n, state, room, s):
    """The second state of a tile into the first."""
    o, size = tile + n * state, 4 * n * room
    tops = o + 2 * size
    _update(tops, load_f32x8(tops + 64), load_f32x8(tops + 96), s, False)
    for i in range(n):
        a, b = load_splat_f32(s + WEIGHTS + 4 * i), load_splat_f32(s + PART_WEIGHTS + 4 * i)
        for d in range(4 * i * room, 4 * (i + 1) * room, 32):
            part = mul_f(load_f32x8(o + size + d), b)
            store_f32x8(o + d, fma(load_f32x8(o + d), a, part))


@jit
def _set_bounds(s, start, n, group, first_bound):
    for i in range(n):
        store_i32(s + BOUNDS + 4 * i, first_bound + (start + i) // group)


@jit
def _set_lows(s, start, n, group, first_bound):
    """Both bounds of every query."""
    _set_bounds(s, start, n, group, first_bound)
    for i in range(n):
        low = load_i32(s + FIRST) + (start + i) // group
        store_i32(s + LOWS + 4 * i, max(low, 0))


@jit
def _set_nothing(s, start, n, group, first_bound):
    pass


@jit
def _visible(page, n_pinned, ring):
    """The first visible page from `page` on."""
    return ring if n_pinned <= page < ring else page


@jit
def _all_seen(a, table, pos):
    return 0, 0


@jit
def _window_seen(a, table, pos):
    """How many pages of the cache a row's window has passed, and its first position on the next."""
    window = word(a + ATTEND_WINDOW)
    n_passed = pages_passed(table, pos, window)
    return n_passed, first_seen(table, pos, window) - PAGE * n_passed


def _types(features):
    """Of K and of V, as a page is read: K of blocks that serves as V becomes q8_0."""
    kinds = {each[0]: each[2:] for each in features if each[:2] in ("k_", "v_")}
    k_kind = kinds.get("k", "f16")
    if "shared" in features:
        return k_kind, "f16" if k_kind == "f16" else "q8_0"
    return k_kind, kinds.get("v", "f16")


def make(isa, k_dim, v_dim, *features):
    k_dim, v_dim, kinds = int(k_dim), int(v_dim), _types(features)
    k_kind, v_kind = kinds
    room = v_room(v_dim, v_kind)
    size = query_bytes(k_room(k_dim, k_kind), room)
    k_head_bytes, v_head_bytes = k_bytes_of(k_dim, k_kind), v_bytes_of(v_dim, v_kind)
    page_4, page_3, page_2, page_1 = (
        _page_of(isa, n, k_dim, v_dim, kinds, features) for n in (4, 3, 2, 1)
    )
    gather = queries_of(k_dim, k_kind, "hadamard" in features)
    values_in = own_values
    if "shared" in features:
        values_in = shared_values(k_dim, v_dim, k_kind)
    scratch = local(LOCAL_BYTES)
    is_windowed = "window" in features
    set_lows = _set_lows if is_windowed else _set_nothing
    seen_of = _window_seen if is_windowed else _all_seen
    state = 4 * k_room(k_dim, k_kind)

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
                common, last = bound(s, 0), bound(s, n - 1)
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
            _fold_segment(region + start * size, n, state, room, s)
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
        store_f32(s + CAP, load_f32(a + ATTEND_CAP))
        end = n_segments(table, last_page, n_passed)
        if word(item + ITEM_SEGMENT) != ALL_SEGMENTS:
            end = 1
        k_bytes, v_bytes = word(a + ATTEND_K_PAGE_BYTES), word(a + ATTEND_V_PAGE_BYTES)
        values = word(a + ATTEND_VALUES) + thread * v_head_bytes
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
                    gather(q, stride, group, n_queries, region, size, s)
                    source = wanted
                k, v = k_base + slot * k_bytes, v_base + slot * v_bytes
                bound = pos % PAGE + 1 if p == last_page else PAGE
                store_i32(s + FIRST, low if p == begin else -PAGE)
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
