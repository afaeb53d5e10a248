"""Weight types with blocks of 256 columns: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.

Knows nothing of matmuls; `formats.py` says what pack and value mean, `grid.py` what a product is.
Scales of 32 columns multiply as floats, those of 16 columns as integers.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from edgeinfer.kernels.cpu.native.blocks32 import (
    five_bits,
    fives,
    nibble,
    nibbles,
    scaled_with_low,
)
from edgeinfer.kernels.cpu.native.fields import (
    load_i8_pairs,
    load_u8_pairs,
    of_pairs,
    words_left,
    words_right,
)
from edgeinfer.kernels.cpu.native.grid import Product
from edgeinfer.kernels.cpu.native.operations import (
    and_i,
    fma,
    load_f16x8,
    load_u8x8,
    mul_f,
    mul_i,
    neg_f,
    or_i,
    shift_left,
    shift_right,
    splat_i16,
    splat_u8,
    sub_i,
    to_f32,
)
from edgeinfer.kernels.cpu.native.words import (
    load_f16,
    load_i8,
    load_u8,
    load_u16,
    load_u32,
    store_u8,
    store_u16,
    store_u32,
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


def _product_by_32(quads, largest, sub_bytes):
    """acc + (d * scale) * dx * dot - (dmin * min) * (dx * sum of x)."""

    @jit
    def unpack(p, i):
        scale = mul_f(load_f16x8(p), to_f32(load_u8x8(p + 32 + 8 * i)))
        low = mul_f(neg_f(load_f16x8(p + 16)), to_f32(load_u8x8(p + 96 + 8 * i)))
        return (scale, low) + quads(p + 160 + sub_bytes * i)

    return Product(10, unpack, scaled_with_low(largest))


def product_q4_k(isa, load):
    return _product_by_32(nibbles(load), 15, 128)


def product_q5_k(isa, load):
    return _product_by_32(fives(load), 31, 160)


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


def _scaled_by_16(largest, is_short=False):
    """acc + d * dx * (the dots of two sub-blocks times their scales, plus pairs times sums of x).

    The fields are d, two scales, pairs, and 8 quads.
    """

    def add_of(grid):
        scale, pair_dots = grid.scale(0), grid.pair_dots(3)
        add_dots = grid.scaled_dots(1, 4, largest, is_short)

        @jit
        def add(fields, x, acc):
            dots = add_dots(fields, x, pair_dots(fields, x))
            return fma(scale(fields, x), to_f32(dots), acc)

        return add

    return add_of


def product_q6_k(isa, load):
    first, second = of_pairs(isa.scale_first), of_pairs(isa.scale_second)

    @jit
    def quads(p):
        """Quads 0 to 3 of a sub-block of 16."""
        a, b, high = load(p), load(p + 32), load(p + 64)
        return (
            or_i(and_i(a, splat_u8(15)), and_i(words_left(high, 4), splat_u8(48))),
            or_i(and_i(b, splat_u8(15)), and_i(words_left(high, 2), splat_u8(48))),
            or_i(shift_right(a, 4), and_i(high, splat_u8(48))),
            or_i(shift_right(b, 4), and_i(words_right(high, 2), splat_u8(48))),
        )

    @jit
    def unpack(p, i):
        scales, at = load_i8_pairs(p + 16 + 16 * i), p + 144 + 192 * i
        offsets = mul_i(scales, splat_i16(-32))
        scale = (load_f16x8(p), first(scales), second(scales), offsets)
        return scale + quads(at) + quads(at + 96)

    return Product(12, unpack, _scaled_by_16(63))


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


@jit
def _pairs_of_bits(v):
    """The four pairs of bits of every byte."""
    three = splat_u8(3)
    return (
        and_i(v, three),
        and_i(words_right(v, 2), three),
        and_i(words_right(v, 4), three),
        and_i(words_right(v, 6), three),
    )


def product_q2_k(isa, load):
    first, second = of_pairs(isa.short_first), of_pairs(isa.short_second)

    @jit
    def unpack(p, i):
        both, at = load_u8_pairs(p + 32 + 16 * i), p + 160 + 64 * i
        scales, lows = and_i(both, splat_i16(15)), shift_right(both, 4)
        d, minus_dmin = load_f16x8(p), neg_f(load_f16x8(p + 16))
        scale = (d, minus_dmin, first(scales), second(scales), lows)
        return scale + _pairs_of_bits(load(at)) + _pairs_of_bits(load(at + 32))

    def add_of(grid):
        scale, low_scale, low_dots = grid.scale(0), grid.scale(1), grid.pair_dots(4)
        add_dots, zeros = grid.scaled_dots(2, 5, 3, is_short=True), grid.zeros

        @jit
        def add(fields, x, acc):
            dots, lows = add_dots(fields, x, zeros()), low_dots(fields, x)
            acc = fma(scale(fields, x), to_f32(dots), acc)
            return fma(low_scale(fields, x), to_f32(lows), acc)

        return add

    return Product(13, unpack, add_of, n_tokens=1)


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


def product_q3_k(isa, load):
    first, second = of_pairs(isa.short_first), of_pairs(isa.short_second)

    @jit
    def scale_pairs(p, i):
        low = and_i(words_right(load_u8_pairs(p + 16 + 16 * (i & 3)), 4 * (i >> 2)), splat_i16(15))
        high = and_i(words_right(load_u8_pairs(p + 80 + 16 * (i & 1)), 2 * (i >> 1)), splat_i16(3))
        return sub_i(or_i(low, shift_left(high, 4)), splat_i16(32))

    @jit
    def quads(v, third):
        """`third` has the third bits of quad j at bit 2 + j."""
        (a, b, c, d), four = _pairs_of_bits(v), splat_u8(4)
        return (
            or_i(a, and_i(third, four)),
            or_i(b, and_i(words_right(third, 1), four)),
            or_i(c, and_i(words_right(third, 2), four)),
            or_i(d, and_i(words_right(third, 3), four)),
        )

    @jit
    def unpack(p, i):
        scales, at = scale_pairs(p, i), p + 112 + 96 * i
        third, offsets = load(at + 64), mul_i(scales, splat_i16(-4))
        even = quads(load(at), words_left(third, 2))
        odd = quads(load(at + 32), words_right(third, 2))
        return (load_f16x8(p), first(scales), second(scales), offsets) + even + odd

    return Product(12, unpack, _scaled_by_16(7, is_short=True), n_tokens=1)
