"""Weight types with blocks of 256 columns: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.

Knows nothing of matmuls; `formats.py` says what pack, accumulate and value mean. Scales of 32
columns multiply as floats. Those of 16 columns multiply as integers; the sums of 32 columns are
added up as floats, and d multiplies once for all 256.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from edgeinfer.kernels.cpu.layout import A32_D, A32_DSUM, A32_SUMS
from edgeinfer.kernels.cpu.native.blocks32 import five_bit_total, five_bits, nibble, nibble_dots
from edgeinfer.kernels.cpu.native.fields import (
    first_twice,
    load_i8_pairs,
    load_u8_pairs,
    mul_words,
    second_twice,
    words_left,
    words_right,
)
from edgeinfer.kernels.cpu.native.simd import (
    and_i,
    fma,
    load_f16,
    load_f16x8,
    load_i8,
    load_splats_f32,
    load_u8,
    load_u8x8,
    load_u16,
    load_u32,
    mul_f,
    mul_i,
    neg_f,
    or_i,
    shift_left,
    shift_right,
    splat_i16,
    splat_u8,
    store_u8,
    store_u16,
    store_u32,
    sub_i,
    to_f32,
    zeros_f32,
    zeros_i32,
)

jit = njit(error_model="numpy")
u32, f32 = np.uint32, np.float32


# -- 256 columns, sub-blocks of 32 with scale and min: Q4_K, Q5_K --------------------------------


@jit
def _pack_scales_and_mins(src, dst, lane):
    """The 12 bytes of 6-bit fields to 8 scales at dst and 8 mins 64 bytes behind them."""
    for i in range(4):
        scale, low, rest = (
            u32(load_u8(src + i)),
            u32(load_u8(src + 4 + i)),
            u32(load_u8(src + 8 + i)),
        )
        at = dst + 8 * i + lane
        store_u8(at, scale & u32(63))
        store_u8(at + 64, low & u32(63))
        store_u8(at + 32, (rest & u32(15)) | ((scale >> u32(6)) << u32(4)))
        store_u8(at + 96, (rest >> u32(4)) | ((low >> u32(6)) << u32(4)))


@jit
def _pack_nibbles_32(src, nibble, dst, lane):
    """One sub-block of 32: its elements are one nibble of 32 bytes of the file."""
    shift, mask = u32(4 * nibble), u32(0x0F0F0F0F)
    for j in range(4):
        first = (load_u32(src + 4 * j) >> shift) & mask
        second = (load_u32(src + 16 + 4 * j) >> shift) & mask
        store_u32(dst + 32 * j + 4 * lane, first | (second << u32(4)))


@jit
def _bit_of_each(src, bit):
    """Bit `bit` of 32 bytes: of byte 4j + k to bit j of byte k."""
    out = u32(0)
    for j in range(8):
        out |= ((load_u32(src + 4 * j) >> u32(bit)) & u32(0x01010101)) << u32(j)
    return out


@jit
def _pair_of_each(src, field):
    """Bits 2 * field and above of 16 bytes: of byte 4j + k to bits 2j, 2j + 1 of byte k."""
    out = u32(0)
    for j in range(4):
        out |= ((load_u32(src + 4 * j) >> u32(2 * field)) & u32(0x03030303)) << u32(2 * j)
    return out


@jit
def pack_q4_k(src, dst, lane):
    store_u16(dst + 2 * lane, load_u16(src))
    store_u16(dst + 16 + 2 * lane, load_u16(src + 2))
    _pack_scales_and_mins(src + 4, dst + 32, lane)
    for s in range(8):
        _pack_nibbles_32(src + 16 + 32 * (s >> 1), s & 1, dst + 160 + 128 * s, lane)


@jit
def pack_q5_k(src, dst, lane):
    store_u16(dst + 2 * lane, load_u16(src))
    store_u16(dst + 16 + 2 * lane, load_u16(src + 2))
    _pack_scales_and_mins(src + 4, dst + 32, lane)
    for s in range(8):
        to = dst + 160 + 160 * s
        store_u32(to + 4 * lane, _bit_of_each(src + 16, s))
        _pack_nibbles_32(src + 48 + 32 * (s >> 1), s & 1, to + 32, lane)


@jit
def _scale_and_min(p, s, lane, q):
    scale = load_f16(p + 2 * lane) * f32(load_u8(p + 32 + 8 * s + lane))
    low = load_f16(p + 16 + 2 * lane) * f32(load_u8(p + 96 + 8 * s + lane))
    return scale * f32(q) - low


@jit
def value_q4_k(p, k, lane):
    s = k >> 5
    return _scale_and_min(p, s, lane, nibble(p + 160 + 128 * s, k & 31, lane))


@jit
def value_q5_k(p, k, lane):
    s = k >> 5
    return _scale_and_min(p, s, lane, five_bits(p + 160 + 160 * s, k & 31, lane))


def _scaled_by_32(n, dot, sub_bytes):
    """acc + (d * scale) * dx * dot - (dmin * min) * (dx * sum), sub-block by sub-block."""

    @jit
    def add(p, q, stride, acc):
        d, minus_dmin = load_f16x8(p), neg_f(load_f16x8(p + 16))
        for s in range(8):
            scale = mul_f(d, to_f32(load_u8x8(p + 32 + 8 * s)))
            low = mul_f(minus_dmin, to_f32(load_u8x8(p + 96 + 8 * s)))
            scale_x = mul_f(scale, load_splats_f32(q + A32_D, stride, n))
            acc = fma(scale_x, to_f32(dot(p + 160 + sub_bytes * s, q, stride)), acc)
            acc = fma(low, load_splats_f32(q + A32_DSUM, stride, n), acc)
            q += n * stride
        return acc

    return add


def accumulate_q4_k(isa, n, load):
    dots, zero, total = nibble_dots(isa, n, load), isa.narrow_zero, isa.narrow_sum

    @jit
    def dot(p, q, stride):
        return total(dots(p, q, stride, zero(n)))

    return _scaled_by_32(n, dot, 128)


def accumulate_q5_k(isa, n, load):
    return _scaled_by_32(n, five_bit_total(isa, n, load, 0), 160)


# -- 256 columns, sub-blocks of 16: Q6_K, Q2_K, Q3_K ---------------------------------------------


@jit
def _scale_byte(p, s, lane):
    """Byte s of a row where pairs of sub-blocks lie together."""
    return load_u8(p + ((s >> 1) << 4) + 2 * lane + (s & 1))


@jit
def _pack_pairs(src, dst, lane, n):
    """n pairs of scale bytes of one row to its lane."""
    for i in range(n):
        store_u16(dst + 16 * i + 2 * lane, load_u16(src + 2 * i))


@jit
def pack_q6_k(src, dst, lane):
    store_u16(dst + 2 * lane, load_u16(src + 208))
    _pack_pairs(src + 192, dst + 16, lane, 8)
    mask = u32(0x0F0F0F0F)
    for s in range(16):
        half, r = s >> 3, s & 7
        low, shift = src + 64 * half + 16 * (r & 3), u32(4 * (r >> 2))
        to = dst + 144 + 96 * s + 4 * lane
        for j in range(2):
            first = (load_u32(low + 4 * j) >> shift) & mask
            second = (load_u32(low + 8 + 4 * j) >> shift) & mask
            store_u32(to + 32 * j, first | (second << u32(4)))
        store_u32(to + 64, _pair_of_each(src + 128 + 32 * half + 16 * (r & 1), r >> 1))


@jit
def _two_bits(p, k, lane):
    """Element k of 16 whose bit pairs are at p."""
    return (u32(load_u8(p + 4 * lane + (k & 3))) >> u32((k >> 2) << 1)) & u32(3)


@jit
def value_q6_k(p, k, lane):
    s, e = k >> 4, k & 15
    at = p + 144 + 96 * s
    nibbles = u32(load_u8(at + ((e & 4) << 3) + 4 * lane + (e & 3)))
    u = ((nibbles >> u32((e >> 3) << 2)) & u32(15)) | (_two_bits(at + 64, e, lane) << u32(4))
    scale = load_i8(p + 16 + ((s >> 1) << 4) + 2 * lane + (s & 1))
    return load_f16(p + 2 * lane) * f32(scale) * f32(np.int32(u) - np.int32(32))


def accumulate_q6_k(isa, n, load):
    assert isa.narrow_dots(63) >= 2
    zero, dot, add_scaled, pair_dot = isa.narrow_zero, isa.narrow_dot, isa.add_scaled, isa.pair_dot
    first, second, in_one = isa.scale_first, isa.scale_second, isa.narrow_is_wide

    @jit
    def low(p, high):
        a = or_i(and_i(load(p), splat_u8(15)), and_i(words_left(high, 4), splat_u8(48)))
        b = or_i(and_i(load(p + 32), splat_u8(15)), and_i(words_left(high, 2), splat_u8(48)))
        return a, b

    @jit
    def high(p, high):
        a = or_i(shift_right(load(p), 4), and_i(high, splat_u8(48)))
        b = or_i(shift_right(load(p + 32), 4), and_i(words_right(high, 2), splat_u8(48)))
        return a, b

    @jit
    def add_sub_block(p, q, stride, scale, isum):
        bits = load(p + 64)
        if in_one:
            return add_scaled(isum, dot(zero(n), low(p, bits) + high(p, bits), q, stride), scale)
        isum = add_scaled(isum, dot(zero(n), low(p, bits), q, stride), scale)
        return add_scaled(isum, dot(zero(n), high(p, bits), q + 8, stride), scale)

    @jit
    def add(p, q, stride, acc):
        total = zeros_f32(n)
        for i in range(8):
            scales, at = load_i8_pairs(p + 16 + 16 * i), p + 144 + 192 * i
            isum = add_sub_block(at, q, stride, first(scales), zeros_i32(n))
            isum = add_sub_block(at + 96, q + 16, stride, second(scales), isum)
            isum = pair_dot(isum, mul_i(scales, splat_i16(-32)), q + A32_SUMS, stride)
            total = fma(load_splats_f32(q + A32_D, stride, n), to_f32(isum), total)
            q += n * stride
        return fma(load_f16x8(p), total, acc)

    return add


@jit
def pack_q2_k(src, dst, lane):
    store_u16(dst + 2 * lane, load_u16(src + 80))
    store_u16(dst + 16 + 2 * lane, load_u16(src + 82))
    _pack_pairs(src, dst + 32, lane, 8)
    for s in range(16):
        quants = _pair_of_each(src + 16 + 32 * (s >> 3) + 16 * (s & 1), (s >> 1) & 3)
        store_u32(dst + 160 + 32 * s + 4 * lane, quants)


@jit
def value_q2_k(p, k, lane):
    s = k >> 4
    both = u32(_scale_byte(p + 32, s, lane))
    scale = load_f16(p + 2 * lane) * f32(both & u32(15))
    low = load_f16(p + 16 + 2 * lane) * f32(both >> u32(4))
    return scale * f32(_two_bits(p + 160 + 32 * s, k & 15, lane)) - low


def accumulate_q2_k(isa, n, load):
    assert isa.narrow_dots(3) >= 4
    zero, dot, add_short, pair_dot = isa.narrow_zero, isa.narrow_dot, isa.add_short, isa.pair_dot
    first, second, total_of = isa.short_first, isa.short_second, isa.narrow_sum

    @jit
    def quads(v):
        return (
            and_i(v, splat_u8(3)),
            and_i(words_right(v, 2), splat_u8(3)),
            and_i(words_right(v, 4), splat_u8(3)),
            and_i(words_right(v, 6), splat_u8(3)),
        )

    @jit
    def times(vectors, scale):
        a, b, c, d = vectors
        return mul_words(a, scale), mul_words(b, scale), mul_words(c, scale), mul_words(d, scale)

    @jit
    def add_sub_block(p, q, stride, scale, isum):
        return add_short(isum, dot(zero(n), quads(load(p)), q, stride), scale)

    @jit
    def dots(p, q, stride, scales):
        """For few tokens: scale the dots."""
        isum = add_sub_block(p, q, stride, first(scales), zeros_i32(n))
        return add_sub_block(p + 32, q + 16, stride, second(scales), isum)

    @jit
    def scaled_dots(p, q, stride, scales):
        """For many: scale the weights, at most 45, two bytes in one multiplication."""
        a = times(quads(load(p)), first_twice(scales))
        b = times(quads(load(p + 32)), second_twice(scales))
        return total_of(dot(zero(n), a + b, q, stride))

    isum_of = scaled_dots if isa.narrow_is_wide and n >= 4 else dots

    @jit
    def add(p, q, stride, acc):
        total, low = zeros_f32(n), zeros_f32(n)
        for i in range(8):
            both = load_u8_pairs(p + 32 + 16 * i)
            isum = isum_of(p + 160 + 64 * i, q, stride, and_i(both, splat_i16(15)))
            msum = pair_dot(zeros_i32(n), shift_right(both, 4), q + A32_SUMS, stride)
            dx = load_splats_f32(q + A32_D, stride, n)
            total, low = fma(dx, to_f32(isum), total), fma(dx, to_f32(msum), low)
            q += n * stride
        acc = fma(load_f16x8(p), total, acc)
        return fma(neg_f(load_f16x8(p + 16)), low, acc)

    return add


@jit
def pack_q3_k(src, dst, lane):
    store_u16(dst + 2 * lane, load_u16(src + 108))
    _pack_pairs(src + 96, dst + 16, lane, 6)
    for i in range(8):
        quants, to = src + 32 + 32 * (i >> 2), dst + 112 + 96 * i + 4 * lane
        store_u32(to, _pair_of_each(quants, i & 3))
        store_u32(to + 32, _pair_of_each(quants + 16, i & 3))
        store_u32(to + 64, _bit_of_each(src, i))


@jit
def value_q3_k(p, k, lane):
    s, e = k >> 4, k & 15
    i = s >> 1
    at = p + 112 + 96 * i
    third = u32(load_u8(at + 64 + 4 * lane + (e & 3))) >> u32(((s & 1) << 2) + (e >> 2)) & u32(1)
    u = _two_bits(at + ((s & 1) << 5), e, lane) | (third << u32(2))
    low = u32(_scale_byte(p + 16, s & 7, lane)) >> u32((s >> 3) << 2) & u32(15)
    high = u32(_scale_byte(p + 80, s & 3, lane)) >> u32((s >> 2) << 1) & u32(3)
    scale = np.int32(low | (high << u32(4))) - np.int32(32)
    return load_f16(p + 2 * lane) * f32(scale) * f32(np.int32(u) - np.int32(4))


def accumulate_q3_k(isa, n, load):
    assert isa.narrow_dots(7) >= 4
    zero, dot, add_short, pair_dot = isa.narrow_zero, isa.narrow_dot, isa.add_short, isa.pair_dot
    first, second = isa.short_first, isa.short_second

    @jit
    def scale_pairs(p, i):
        low = and_i(words_right(load_u8_pairs(p + 16 + 16 * (i & 3)), 4 * (i >> 2)), splat_i16(15))
        high = and_i(words_right(load_u8_pairs(p + 80 + 16 * (i & 1)), 2 * (i >> 1)), splat_i16(3))
        return sub_i(or_i(low, shift_left(high, 4)), splat_i16(32))

    @jit
    def add_sub_block(p, third, q, stride, scale, isum):
        """`third` has the third bits of quad j at bit 2 + j."""
        v = load(p)
        quads = (
            or_i(and_i(v, splat_u8(3)), and_i(third, splat_u8(4))),
            or_i(and_i(words_right(v, 2), splat_u8(3)), and_i(words_right(third, 1), splat_u8(4))),
            or_i(and_i(words_right(v, 4), splat_u8(3)), and_i(words_right(third, 2), splat_u8(4))),
            or_i(and_i(words_right(v, 6), splat_u8(3)), and_i(words_right(third, 3), splat_u8(4))),
        )
        return add_short(isum, dot(zero(n), quads, q, stride), scale)

    @jit
    def add(p, q, stride, acc):
        total = zeros_f32(n)
        for i in range(8):
            scales, at, third = scale_pairs(p, i), p + 112 + 96 * i, load(p + 176 + 96 * i)
            even, odd = words_left(third, 2), words_right(third, 2)
            isum = add_sub_block(at, even, q, stride, first(scales), zeros_i32(n))
            isum = add_sub_block(at + 32, odd, q + 16, stride, second(scales), isum)
            isum = pair_dot(isum, mul_i(scales, splat_i16(-4)), q + A32_SUMS, stride)
            total = fma(load_splats_f32(q + A32_D, stride, n), to_f32(isum), total)
            q += n * stride
        return fma(load_f16x8(p), total, acc)

    return add
