"""Passes over the logits of the whole vocabulary: the largest, sums, and the first candidates.

NaN and -inf are never candidates; +inf counts as the largest float.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types

from edgeinfer.kernels.cpu import layout as at
from edgeinfer.kernels.cpu.native.inlining import not_inlined
from edgeinfer.kernels.cpu.native.operations import (
    add_f,
    load_f32x8,
    max_f,
    max_lanes,
    min_f,
    mul_f,
    splat_f32,
    splat_f64,
    sub_f,
)
from edgeinfer.kernels.cpu.native.sampling.numbers import (
    INF,
    LARGEST,
    exp8,
    key_of,
    narrow,
    sqrt,
    sum8,
    value_of,
    widen,
    widen8,
)
from edgeinfer.kernels.cpu.native.sampling.sort import select
from edgeinfer.kernels.cpu.native.simd import (
    I8,
    I64,
    call,
    f32x8,
    intp,
    load_ir,
    mapped,
    scalar,
    splat_ir,
    store_ir,
)
from edgeinfer.kernels.cpu.native.words import load_f32, load_u8, set_word, store_f32, word

jit = njit(error_model="numpy")

_SUM_CHUNK = 4096  # the order of sums is that of edgeinfer.sampling.sampler

# -- instructions --------------------------------------------------------------------------------


def _emit_mask(b, p, x, compare):
    """Bit i says how float i of the 64 at p compares with x; a NaN never does."""
    limit = splat_ir(b, x, 8)
    mask = I64(0)
    for i in range(8):
        v = load_ir(b, b.add(p, I64(32 * i)), f32x8.ir)
        bits = b.zext(b.bitcast(b.fcmp_ordered(compare, v, limit), I8), I64)
        mask = b.or_(mask, b.shl(bits, I64(8 * i)))
    return mask


def _emit_real(b, x, other):
    """x where it is a candidate's logit, neither NaN nor -inf; else `other`."""
    lowest = ir.Constant(x.type, [float("-inf")] * 8)
    return b.select(b.fcmp_ordered(">", x, lowest), x, other)


def _emit_masked(b, to, p, mask):
    """The 8 floats at p go to `to`, -inf where the bit of the byte at `mask` is 0."""
    is_allowed = b.bitcast(load_ir(b, mask, I8), ir.VectorType(ir.IntType(1), 8))
    lowest = ir.Constant(f32x8.ir, [float("-inf")] * 8)
    store_ir(b, to, b.select(is_allowed, load_ir(b, p, f32x8.ir), lowest))


_masked8 = scalar(types.void, (intp, intp, intp), _emit_masked)
_above = scalar(intp, (intp, types.float32), lambda b, p, x: _emit_mask(b, p, x, ">"))
_at_least = scalar(intp, (intp, types.float32), lambda b, p, x: _emit_mask(b, p, x, ">="))
_lowest_bit = scalar(intp, (intp,), lambda b, x: call(b, "llvm.cttz.i64", I64, x, ir.IntType(1)(0)))
_n_bits = scalar(intp, (intp,), lambda b, x: call(b, "llvm.ctpop.i64", I64, x))
_real8 = mapped(2, lambda x, y: x, _emit_real)


# -- masks ---------------------------------------------------------------------------------------


@jit
def copy_masked(to, logits, n_vocab, mask):
    """Copy logits, -inf for tokens whose bit of the mask is 0."""
    not_inlined()
    n = n_vocab & ~7
    for i in range(0, n, 8):
        _masked8(to + 4 * i, logits + 4 * i, mask + (i >> 3))
    for i in range(n, n_vocab):
        is_allowed = (load_u8(mask + (i >> 3)) >> (i & 7)) & 1
        store_f32(to + 4 * i, load_f32(logits + 4 * i) if is_allowed else narrow(-INF))


# -- the largest ---------------------------------------------------------------------------------


@jit
def _fill_tail(logits, n_vocab, scratch):
    """The last n_vocab % 8 logits and -inf behind them; returns how many are not among them."""
    n = n_vocab & ~7
    for i in range(8):
        x = load_f32(logits + 4 * (n + i)) if n + i < n_vocab else narrow(-INF)
        store_f32(scratch + at.SAMPLE_TAIL + 4 * i, x)
    return n


@jit
def largest_logit(logits, n_vocab, scratch):
    """-inf where there is no candidate."""
    not_inlined()
    n = _fill_tail(logits, n_vocab, scratch)
    m0 = max_f(load_f32x8(scratch + at.SAMPLE_TAIL), splat_f32(narrow(-INF)))
    m1 = m0
    for i in range(0, n - 8, 16):
        m0 = max_f(load_f32x8(logits + 4 * i), m0)
        m1 = max_f(load_f32x8(logits + 4 * i + 32), m1)
    if n & 8:
        m0 = max_f(load_f32x8(logits + 4 * (n - 8)), m0)
    m = widen(max_lanes(max_f(m0, m1)))
    return m if m < LARGEST else LARGEST


@jit
def first_at_least(logits, n_vocab, x):
    """The lowest token whose logit is x or more."""
    n = n_vocab & ~63
    for i in range(0, n, 64):
        mask = _at_least(logits + 4 * i, x)
        if mask != 0:
            return i + _lowest_bit(mask)
    for i in range(n, n_vocab):
        if load_f32(logits + 4 * i) >= x:
            return i
    return 0


# -- sums ----------------------------------------------------------------------------------------


@jit
def _sum(logits, n_vocab, scratch, term, a, b):
    """Sum of term(logit, a, b): by lanes inside a chunk, from chunk to chunk left to right."""
    n = _fill_tail(logits, n_vocab, scratch)
    total = 0.0
    for start in range(0, n_vocab, _SUM_CHUNK):
        lanes = splat_f64(0.0)
        for i in range(start, min(start + _SUM_CHUNK, n_vocab), 8):
            x = load_f32x8(logits + 4 * i if i < n else scratch + at.SAMPLE_TAIL)
            x = min_f(splat_f32(narrow(LARGEST)), x)  # a NaN stays one
            lanes = add_f(lanes, term(widen8(x), a, b))
        total += sum8(lanes)
    return total


@jit
def _exp_term(x, largest, inverse):
    return exp8(mul_f(sub_f(x, splat_f64(largest)), splat_f64(inverse)))


@jit
def _product_term(x, largest, _):
    scaled = sub_f(_real8(x, splat_f64(largest)), splat_f64(largest))
    return mul_f(exp8(scaled), scaled)


@jit
def _logit_term(x, zero, _):
    return _real8(x, splat_f64(zero))


@jit
def _square_term(x, mean, _):
    off = sub_f(_real8(x, splat_f64(mean)), splat_f64(mean))
    return mul_f(off, off)


@jit
def sum_exp(logits, n_vocab, scratch, largest, inverse):
    """Sum of exp((logit - largest) * inverse) over the vocabulary."""
    not_inlined()
    return _sum(logits, n_vocab, scratch, _exp_term, largest, inverse)


@jit
def sum_products(logits, n_vocab, scratch, largest):
    """Sum of exp(x) * x, x = logit - largest, over the vocabulary."""
    not_inlined()
    return _sum(logits, n_vocab, scratch, _product_term, largest, 0.0)


@jit
def _count(logits, n_vocab):
    """How many candidates there are."""
    n, n_real = n_vocab & ~63, 0
    for i in range(0, n, 64):
        n_real += _n_bits(_above(logits + 4 * i, narrow(-INF)))
    for i in range(n, n_vocab):
        n_real += load_f32(logits + 4 * i) > narrow(-INF)
    return n_real


@jit
def deviation(logits, n_vocab, scratch):
    """How many candidates, and the standard deviation of their logits."""
    n = float(_count(logits, n_vocab))
    mean = _sum(logits, n_vocab, scratch, _logit_term, 0.0, 0.0) / n
    return n, sqrt(_sum(logits, n_vocab, scratch, _square_term, mean, 0.0) / n)


# -- the first candidates ------------------------------------------------------------------------


@jit
def gather(logits, n_vocab, keys, k, floor):
    """Keys of the first k candidates with logits above `floor`, unsorted; returns how many.

    Keys are gathered above a threshold that rises to the k-th best seen whenever they fill up.
    """
    not_inlined()
    room = max(1024, 4 * k)
    above = narrow(floor)
    n = 0
    for i in range(0, n_vocab, 64):
        if i + 64 <= n_vocab:
            mask = _above(logits + 4 * i, above)
            while mask != 0:
                j = i + _lowest_bit(mask)
                set_word(keys + 8 * n, key_of(load_f32(logits + 4 * j), j))
                n += 1
                mask &= mask - 1
        else:
            for j in range(i, n_vocab):
                x = load_f32(logits + 4 * j)
                if x > above:
                    set_word(keys + 8 * n, key_of(x, j))
                    n += 1
        if n >= room or (n > k and i + 64 >= n_vocab):
            select(keys, n, k)
            n = k
            above = narrow(value_of(word(keys + 8 * (k - 1))))
    return n
