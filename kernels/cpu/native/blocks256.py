"""Weight types with blocks of 256 columns: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.

Knows nothing of matmuls; `formats.py` says what pack, accumulate and value mean. Scales of
sub-blocks multiply in integers, so a block costs one rounding (two with mins).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from edgeinfer.kernels.cpu.layout import (
    A256_D,
    A256_SUMS,
)
from edgeinfer.kernels.cpu.native.blocks32 import five_bit_dots, five_bits, nibble, nibble_dots
from edgeinfer.kernels.cpu.native.fields import (
    first_twice,
    load_i8_pairs,
    load_u8_pairs,
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
        at = dst + ((i >> 1) << 4) + 2 * lane + (i & 1)
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
def _scale_byte(p, s, lane):
    """Byte s of a row where pairs of sub-blocks lie together."""
    return load_u8(p + ((s >> 1) << 4) + 2 * lane + (s & 1))


@jit
def _scale_and_min(p, s, lane, q):
    scale = load_f16(p + 2 * lane) * f32(_scale_byte(p + 32, s, lane))
    low = load_f16(p + 16 + 2 * lane) * f32(_scale_byte(p + 96, s, lane))
    return scale * f32(q) - low


@jit
def value_q4_k(p, k, lane):
    s = k >> 5
    return _scale_and_min(p, s, lane, nibble(p + 160 + 128 * s, k & 31, lane))


@jit
def value_q5_k(p, k, lane):
    s = k >> 5
    return _scale_and_min(p, s, lane, five_bits(p + 160 + 160 * s, k & 31, lane))


def _with_mins(n):
    """acc + d * isum - dmin * msum, for the types whose blocks start with d and dmin."""

    @jit
    def add(p, q, stride, isum, msum, acc):
        dx = load_splats_f32(q + A256_D, stride, n)
        acc = fma(mul_f(load_f16x8(p), dx), to_f32(isum), acc)
        return fma(neg_f(mul_f(load_f16x8(p + 16), dx)), to_f32(msum), acc)

    return add


def _scaled_by_32(isa, n, add_sub_block, sub_bytes):
    """Q4_K and Q5_K but for their sub-blocks: `add_sub_block(p, q, stride, scale, isum)`."""
    first, second, pair_dot, with_mins = (
        isa.scale_first, isa.scale_second, isa.pair_dot, _with_mins(n)
    )  # fmt: skip

    @jit
    def add(p, q, stride, acc):
        isum = zeros_i32(n)
        for i in range(4):
            scales = load_u8_pairs(p + 32 + 16 * i)
            at, x = p + 160 + 2 * sub_bytes * i, q + 64 * i
            isum = add_sub_block(at, x, stride, first(scales), isum)
            isum = add_sub_block(at + sub_bytes, x + 32, stride, second(scales), isum)
        msum = zeros_i32(n)
        for i in range(4):
            mins, x = load_u8_pairs(p + 96 + 16 * i), q + A256_SUMS + 8 * i
            msum = pair_dot(msum, first_twice(mins), x, stride)
            msum = pair_dot(msum, second_twice(mins), x + 4, stride)
        return with_mins(p, q, stride, isum, msum, acc)

    return add


def accumulate_q4_k(isa, n, load):
    dots, zero, add_scaled = nibble_dots(isa, n, load), isa.narrow_zero, isa.add_scaled

    @jit
    def add_sub_block(p, q, stride, scale, isum):
        return add_scaled(isum, dots(p, q, stride, zero(n)), scale)

    return _scaled_by_32(isa, n, add_sub_block, 128)


def accumulate_q5_k(isa, n, load):
    low, high = five_bit_dots(isa, n, load)
    zero, add_scaled = isa.narrow_zero, isa.add_scaled

    @jit
    def in_one(p, q, stride, scale, isum):
        return add_scaled(isum, high(p, q, stride, low(p, q, stride, zero(n))), scale)

    @jit
    def in_halves(p, q, stride, scale, isum):
        isum = add_scaled(isum, low(p, q, stride, zero(n)), scale)
        return add_scaled(isum, high(p, q, stride, zero(n)), scale)

    return _scaled_by_32(isa, n, in_one if isa.narrow_is_wide else in_halves, 160)


# -- 256 columns, sub-blocks of 16: Q6_K, Q2_K, Q3_K ---------------------------------------------


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
    def low(p, q, stride, acc):
        a, b, high = load(p), load(p + 32), load(p + 64)
        a = or_i(and_i(a, splat_u8(15)), and_i(words_left(high, 4), splat_u8(48)))
        b = or_i(and_i(b, splat_u8(15)), and_i(words_left(high, 2), splat_u8(48)))
        return dot(dot(acc, a, q, stride), b, q + 4, stride)

    @jit
    def high(p, q, stride, acc):
        a, b, high = load(p), load(p + 32), load(p + 64)
        a = or_i(shift_right(a, 4), and_i(high, splat_u8(48)))
        b = or_i(shift_right(b, 4), and_i(words_right(high, 2), splat_u8(48)))
        return dot(dot(acc, a, q + 8, stride), b, q + 12, stride)

    @jit
    def add_sub_block(p, q, stride, scale, isum):
        if in_one:
            return add_scaled(isum, high(p, q, stride, low(p, q, stride, zero(n))), scale)
        isum = add_scaled(isum, low(p, q, stride, zero(n)), scale)
        return add_scaled(isum, high(p, q, stride, zero(n)), scale)

    @jit
    def add(p, q, stride, acc):
        isum = zeros_i32(n)
        for i in range(8):
            scales = load_i8_pairs(p + 16 + 16 * i)
            at, x = p + 144 + 192 * i, q + 32 * i
            isum = add_sub_block(at, x, stride, first(scales), isum)
            isum = add_sub_block(at + 96, x + 16, stride, second(scales), isum)
        for i in range(8):
            offsets = mul_i(load_i8_pairs(p + 16 + 16 * i), splat_i16(-32))
            isum = pair_dot(isum, offsets, q + A256_SUMS + 4 * i, stride)
        d = mul_f(load_f16x8(p), load_splats_f32(q + A256_D, stride, n))
        return fma(d, to_f32(isum), acc)

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
    zero, dot, add_scaled, pair_dot = isa.narrow_zero, isa.narrow_dot, isa.add_scaled, isa.pair_dot
    first, second, with_mins = isa.scale_first, isa.scale_second, _with_mins(n)

    @jit
    def add_sub_block(p, q, stride, scale, isum):
        acc, v = zero(n), load(p)
        for j in range(4):
            acc = dot(acc, and_i(words_right(v, 2 * j), splat_u8(3)), q + 4 * j, stride)
        return add_scaled(isum, acc, scale)

    @jit
    def add(p, q, stride, acc):
        isum = zeros_i32(n)
        for i in range(8):
            scales = and_i(load_u8_pairs(p + 32 + 16 * i), splat_i16(15))
            at, x = p + 160 + 64 * i, q + 32 * i
            isum = add_sub_block(at, x, stride, first(scales), isum)
            isum = add_sub_block(at + 32, x + 16, stride, second(scales), isum)
        msum = zeros_i32(n)
        for i in range(8):
            mins = shift_right(load_u8_pairs(p + 32 + 16 * i), 4)
            msum = pair_dot(msum, mins, q + A256_SUMS + 4 * i, stride)
        return with_mins(p, q, stride, isum, msum, acc)

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
    zero, dot, add_scaled, pair_dot = isa.narrow_zero, isa.narrow_dot, isa.add_scaled, isa.pair_dot
    first, second = isa.scale_first, isa.scale_second

    @jit
    def scale_pairs(p, i):
        low = and_i(words_right(load_u8_pairs(p + 16 + 16 * (i & 3)), 4 * (i >> 2)), splat_i16(15))
        high = and_i(words_right(load_u8_pairs(p + 80 + 16 * (i & 1)), 2 * (i >> 1)), splat_i16(3))
        return sub_i(or_i(low, shift_left(high, 4)), splat_i16(32))

    @jit
    def add_sub_block(p, third, q, stride, scale, isum):
        """`third` has the third bits of quad j at bit 2 + j."""
        acc, v = zero(n), load(p)
        for j in range(4):
            u = or_i(
                and_i(words_right(v, 2 * j), splat_u8(3)),
                and_i(words_right(third, j), splat_u8(4)),
            )
            acc = dot(acc, u, q + 4 * j, stride)
        return add_scaled(isum, acc, scale)

    @jit
    def add(p, q, stride, acc):
        isum = zeros_i32(n)
        for i in range(8):
            scales, third = scale_pairs(p, i), load(p + 176 + 96 * i)
            at, x = p + 112 + 96 * i, q + 32 * i
            even, odd = words_left(third, 2), words_right(third, 2)
            isum = add_sub_block(at, even, x, stride, first(scales), isum)
            isum = add_sub_block(at + 32, odd, x + 16, stride, second(scales), isum)
        for i in range(8):
            offsets = mul_i(scale_pairs(p, i), splat_i16(-4))
            isum = pair_dot(isum, offsets, q + A256_SUMS + 4 * i, stride)
        d = mul_f(load_f16x8(p), load_splats_f32(q + A256_D, stride, n))
        return fma(d, to_f32(isum), acc)

    return add
