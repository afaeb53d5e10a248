"""What the attention kernels share: segments a row sees, tiles of queries, folding.

Knows no activations and no rotation. Work items and parts: `layout.py`.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from edgeinfer.kernels.cpu.attention_layout import MAX_QUERIES
from edgeinfer.kernels.cpu.layout import SEGMENT_PAGES, TABLE_PINNED
from edgeinfer.kernels.cpu.native import simd
from edgeinfer.kernels.cpu.native.math import exp
from edgeinfer.kernels.cpu.native.operations import fma, max_f, mul_f, sub_f
from edgeinfer.kernels.cpu.native.pages import first_ring_page, n_gone
from edgeinfer.kernels.cpu.native.simd import I32, Tile, f32x8, i32x8, intp, u8x8
from edgeinfer.kernels.cpu.native.words import word
from edgeinfer.kernels.cpu.page_layout import VECTOR_BYTES

jit = njit(error_model="numpy")


# -- the pages and segments that rows on one page see --------------------------------------------
#
# Rows are on absolute page `page`; a window has passed the first `n_passed` pages of their cache.


@jit
def pinned_end(table, page):
    """The page behind the pinned ones that exist."""
    return min(word(table + TABLE_PINNED), page + 1)


@jit
def pinned_start(table, page, n_passed):
    """The first pinned page that is seen; `pinned_end` where none is."""
    return min(n_passed, pinned_end(table, page))


@jit
def ring_start(table, page, n_passed):
    """The first page behind the pinned ones that is seen."""
    return max(first_ring_page(table, page), n_passed + n_gone(table, page))


@jit
def _n_pinned_segments(table, page, n_passed):
    start, end = pinned_start(table, page, n_passed), pinned_end(table, page)
    if start == end:
        return 0
    return (end + SEGMENT_PAGES - 1) // SEGMENT_PAGES - start // SEGMENT_PAGES


@jit
def _first_ring_segment(table, page, n_passed):
    first = ring_start(table, page, n_passed) // SEGMENT_PAGES
    if pinned_start(table, page, n_passed) == pinned_end(table, page):
        return first
    return max(first, (pinned_end(table, page) + SEGMENT_PAGES - 1) // SEGMENT_PAGES)


@jit
def n_segments(table, page, n_passed):
    """How many segments have a page that is seen."""
    rest = page // SEGMENT_PAGES + 1 - _first_ring_segment(table, page, n_passed)
    return _n_pinned_segments(table, page, n_passed) + max(rest, 0)


@jit
def segment(table, page, n_passed, i):
    """The i-th of them, as 512-position segment of the sequence."""
    n_pinned = _n_pinned_segments(table, page, n_passed)
    if i < n_pinned:
        return pinned_start(table, page, n_passed) // SEGMENT_PAGES + i
    return _first_ring_segment(table, page, n_passed) + i - n_pinned


# -- tiles of queries ---------------------------------------------------------------------------


@jit
def tile_of(query, n_queries):
    """First query and size of the tile that one of n_queries belongs to."""
    start = query // MAX_QUERIES * MAX_QUERIES
    return start, min(MAX_QUERIES, n_queries - start)


# -- folding -------------------------------------------------------------------------------------


@jit
def fold_weights(m0, m, l0, l):  # noqa: E741
    """State (m0, l0) and part (m, l): the new m and l, and what to scale state and part by."""
    top = max_f(m0, m)
    a, b = exp(sub_f(m0, top)), exp(sub_f(m, top))
    return top, fma(l0, a, mul_f(l, b)), a, b


# -- across the lanes of up to 8 vectors ---------------------------------------------------------


def _across(combine):
    """Row i of a tile folded as by `sum_lanes`, in lane i; lanes without a row mean nothing."""

    def mix(b, x, y, lanes, step):
        """Lanes (0 .. 15 over x and y) and those `step` further, combined."""
        first, second = (
            b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, 8), [i + by for i in lanes]))
            for by in (0, step)
        )
        return combine(b, first, second)

    @intrinsic
    def across(typingctx, tile):
        if not isinstance(tile, Tile) or tile.n > 8:
            return None

        def codegen(context, b, signature, values):
            rows = [b.extract_value(values[0], i if i < tile.n else 0) for i in range(8)]
            fours = [mix(b, rows[i], rows[i + 4], (0, 1, 2, 3, 8, 9, 10, 11), 4) for i in range(4)]
            twos = [mix(b, fours[i], fours[i + 1], (0, 1, 8, 9, 4, 5, 12, 13), 2) for i in (0, 2)]
            return mix(b, *twos, (0, 2, 8, 10, 4, 6, 12, 14), 1)

        return f32x8(tile), codegen

    return across


sum_rows = _across(lambda b, x, y: b.fadd(x, y))
max_rows = _across(lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))


# -- products of a tile of queries with K or V ---------------------------------------------------


def _cast_all(context, builder, signature, values):
    return [
        v if isinstance(kind, Tile) else context.cast(builder, v, kind, intp)
        for kind, v in zip(signature.args, values, strict=True)
    ]


def _load_bytes_ir(b, y, wide):
    """Vectors of 8 bytes, which have signs."""
    for v in range(wide):
        loaded = simd.load_ir(b, b.add(y, simd.I64(8 * v)), u8x8.ir)
        yield b.sitofp(b.sext(loaded, i32x8.ir), f32x8.ir)


def _load_nibbles_ir(b, y, wide):
    """Less 8, the low ones of 8 bytes, then the high ones: an even number of vectors."""
    for v in range(0, wide, 2):
        both = b.zext(simd.load_ir(b, b.add(y, simd.I64(4 * v)), u8x8.ir), i32x8.ir)
        nibbles = b.and_(both, simd.const_ir(i32x8, 15)), b.lshr(both, simd.const_ir(i32x8, 4))
        for each in nibbles:
            yield b.sitofp(b.sub(each, simd.const_ir(i32x8, 8)), f32x8.ir)


def _load_halves_ir(b, y, wide):
    for v in range(wide):
        at = b.add(y, simd.I64(VECTOR_BYTES["f16"] * v))
        yield simd.load_f16_ir(b, at, f32x8.ir)


_LOADS = {"f16": _load_halves_ir, "q8_0": _load_bytes_ir, "q4_0": _load_nibbles_ir}


def grid(n, wide, y_type="f16"):
    """Operations on `n` queries x `wide` vectors of 8: row i * wide + v of a tile is (i, v).

    `multiply(acc, x, x_stride, y)`: acc[i, v] + x[i] * y[v], x floats and y values of a type. Where
    these are in blocks of 4 vectors, every block has floats of its own, n * x_stride bytes apart.
    `multiply_visible(acc, x, x_stride, y, bounds, pos)`: only where pos < bounds[i] (int32).
    `multiply_between(..., bounds, pos, lows)`: and where pos >= lows[i].
    `store(p, stride, acc)`; `fold(p, stride, acc, a, b)`: p[i, v] * a[i] + acc[i, v] * b[i].
    """
    kind = Tile(f32x8, n * wide)

    def splat(b, p, stride, i):
        return simd.splat_ir(b, simd.load_ir(b, simd.offset_ir(b, p, stride, i), simd.F32), 8)

    block = wide if y_type == "f16" else 4  # vectors

    def products(b, acc, x, stride, y):
        """What each of a tile was and is, in its order: emitted vector by vector of y, so that
        only one of these is in a register beside the sums and the floats."""
        made = {}
        for v, vector in enumerate(_LOADS[y_type](b, y, wide)):
            if v % block == 0:
                ones = [splat(b, x, stride, v // block * n + i) for i in range(n)]
            for i in range(n):
                old = b.extract_value(acc, i * wide + v)
                made[i, v] = old, simd.call(b, "llvm.fma.v8f32", f32x8.ir, ones[i], vector, old)
        return [(i, *made[i, v]) for i in range(n) for v in range(wide)]

    def place(b, p, stride, i, v):
        at = simd.offset_ir(b, p, stride, i)
        return b.add(at, ir.Constant(simd.I64, 32 * v))

    @intrinsic
    def multiply(typingctx, acc, x, x_stride, y):
        def codegen(context, b, signature, values):
            acc, x, stride, y = _cast_all(context, b, signature, values)
            return simd.tile_ir(b, kind, (new for _, _, new in products(b, acc, x, stride, y)))

        return kind(acc, x, x_stride, y), codegen

    def compare(b, order, here, bounds, i):
        """Whether position `here` is below, or not below, the i-th of some bounds, in all lanes."""
        at = simd.offset_ir(b, bounds, ir.Constant(simd.I64, 4), i)
        bound = simd.splat_ir(b, simd.load_ir(b, at, I32), 8)
        return b.icmp_signed(order, simd.splat_ir(b, here, 8), bound)

    @intrinsic
    def multiply_visible(typingctx, acc, x, x_stride, y, bounds, pos):
        def codegen(context, b, signature, values):
            acc, x, stride, y, bounds, pos = _cast_all(context, b, signature, values)
            here = b.trunc(pos, I32)

            def rows():
                for i, old, new in products(b, acc, x, stride, y):
                    yield b.select(compare(b, "<", here, bounds, i), new, old)

            return simd.tile_ir(b, kind, rows())

        return kind(acc, x, x_stride, y, bounds, pos), codegen

    @intrinsic
    def multiply_between(typingctx, acc, x, x_stride, y, bounds, pos, lows):
        def codegen(context, b, signature, values):
            acc, x, stride, y, bounds, pos, lows = _cast_all(context, b, signature, values)
            here = b.trunc(pos, I32)

            def rows():
                for i, old, new in products(b, acc, x, stride, y):
                    is_seen = b.and_(
                        compare(b, "<", here, bounds, i), compare(b, ">=", here, lows, i)
                    )
                    yield b.select(is_seen, new, old)

            return simd.tile_ir(b, kind, rows())

        return kind(acc, x, x_stride, y, bounds, pos, lows), codegen

    @intrinsic
    def store(typingctx, p, stride, acc):
        def codegen(context, b, signature, values):
            p, stride, acc = _cast_all(context, b, signature, values)
            for i in range(n):
                for v in range(wide):
                    vector = b.extract_value(acc, i * wide + v)
                    simd.store_ir(b, place(b, p, stride, i, v), vector)
            return context.get_dummy_value()

        return types.void(p, stride, acc), codegen

    @intrinsic
    def fold(typingctx, p, stride, acc, weights, part_weights):
        def codegen(context, b, signature, values):
            p, stride, acc, weights, part_weights = _cast_all(context, b, signature, values)
            four = ir.Constant(simd.I64, 4)
            for i in range(n):
                w, u = splat(b, weights, four, i), splat(b, part_weights, four, i)
                for v in range(wide):
                    at = place(b, p, stride, i, v)
                    part = b.fmul(b.extract_value(acc, i * wide + v), u)
                    state = simd.load_ir(b, at, f32x8.ir)
                    simd.store_ir(b, at, simd.call(b, "llvm.fma.v8f32", f32x8.ir, state, w, part))
            return context.get_dummy_value()

        return types.void(p, stride, acc, weights, part_weights), codegen

    return multiply, multiply_visible, multiply_between, store, fold
