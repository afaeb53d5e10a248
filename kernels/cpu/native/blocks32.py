"""Weight types with blocks of 32 columns: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

Knows nothing of matmuls; `formats.py` says what pack, accumulate and value mean.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from edgeinfer.kernels.cpu.layout import A32_D, A32_DSUM, A32_SUMS
from edgeinfer.kernels.cpu.native.fields import words_left, words_right
from edgeinfer.kernels.cpu.native.simd import (
    add_i,
    and_i,
    fma,
    load_f16,
    load_f16x8,
    load_splats_f32,
    load_u8,
    load_u16,
    load_u32,
    mul_f,
    or_i,
    shift_right,
    splat_i16,
    splat_u8,
    store_u16,
    store_u32,
    to_f32,
    zeros_i32,
)

jit = njit(error_model="numpy")
u32, f32 = np.uint32, np.float32


# -- 32 columns, nibbles: Q4_0, Q4_1 -------------------------------------------------------------


@jit
def _pack_words(src, dst, lane, n):
    """n words of one row to its lane of n vectors."""
    for j in range(n):
        store_u32(dst + 32 * j + 4 * lane, load_u32(src + 4 * j))


@jit
def pack_q4_0(src, dst, lane):
    store_u16(dst + 2 * lane, load_u16(src))
    _pack_words(src + 2, dst + 16, lane, 4)


@jit
def pack_q4_1(src, dst, lane):
    store_u16(dst + 2 * lane, load_u16(src))
    store_u16(dst + 16 + 2 * lane, load_u16(src + 2))
    _pack_words(src + 4, dst + 32, lane, 4)


@jit
def nibble(p, k, lane):
    """Element k of 32 whose quants are at p."""
    b = load_u8(p + ((k & 12) << 3) + 4 * lane + (k & 3))
    return (u32(b) >> u32((k >> 4) << 2)) & u32(15)


@jit
def value_q4_0(p, k, lane):
    return load_f16(p + 2 * lane) * f32(np.int32(nibble(p + 16, k, lane)) - np.int32(8))


@jit
def value_q4_1(p, k, lane):
    return load_f16(p + 2 * lane) * f32(nibble(p + 32, k, lane)) + load_f16(p + 16 + 2 * lane)


def nibble_dots(isa, n, load):
    """Eight dots, the bound of int16 for nibbles."""
    assert isa.narrow_dots(15) >= 8
    dot = isa.narrow_dot

    @jit
    def dots(p, q, stride, acc):
        for j in range(4):
            v = load(p + 32 * j)
            acc = dot(acc, and_i(v, splat_u8(15)), q + 4 * j, stride)
            acc = dot(acc, shift_right(v, 4), q + 4 * j + 16, stride)
        return acc

    return dots


def _start_with(isa, n, offset):
    """Where sums are int32 from the start, they start at offset * sum of x; else this adds it."""
    zero, total, pair_dot = isa.narrow_zero, isa.narrow_sum, isa.pair_dot
    early, late = offset and isa.narrow_is_wide, offset and not isa.narrow_is_wide

    @jit
    def start(x_sums, stride):
        if early:
            return pair_dot(zero(n), splat_i16(offset), x_sums, stride)
        return zero(n)

    @jit
    def finish(acc, x_sums, stride):
        if late:
            return pair_dot(total(acc), splat_i16(offset), x_sums, stride)
        return total(acc)

    return start, finish


def accumulate_q4_0(isa, n, load):
    dots, (start, finish) = nibble_dots(isa, n, load), _start_with(isa, n, -8)

    @jit
    def add(p, q, stride, acc):
        d = mul_f(load_f16x8(p), load_splats_f32(q + A32_D, stride, n))
        dot = dots(p + 16, q, stride, start(q + A32_SUMS, stride))
        return fma(d, to_f32(finish(dot, q + A32_SUMS, stride)), acc)

    return add


def _with_min(n):
    """acc + d * dx * dot + m * (dx * sum), for Q4_1 and Q5_1."""

    @jit
    def add(p, q, stride, dot, acc):
        dx = load_splats_f32(q + A32_D, stride, n)
        acc = fma(mul_f(load_f16x8(p), dx), to_f32(dot), acc)
        return fma(load_f16x8(p + 16), load_splats_f32(q + A32_DSUM, stride, n), acc)

    return add


def accumulate_q4_1(isa, n, load):
    dots, with_min = nibble_dots(isa, n, load), _with_min(n)
    zero, total = isa.narrow_zero, isa.narrow_sum

    @jit
    def add(p, q, stride, acc):
        return with_min(p, q, stride, total(dots(p + 32, q, stride, zero(n))), acc)

    return add


# -- 32 columns, five bits: Q5_0, Q5_1 -----------------------------------------------------------


@jit
def _swap_bits(x, mask, distance):
    """Exchange the bits under `mask` with those `distance` above them."""
    t = (x ^ (x >> u32(distance))) & u32(mask)
    return x ^ t ^ (t << u32(distance))


@jit
def _fifth_bits(x):
    """Bit 4j + k to bit 8k + j: the indices j2 j1 j0 k1 k0 become k1 k0 j2 j1 j0."""
    x = _swap_bits(x, 0x0A0A0A0A, 3)  # index bits 0 and 2: j2 j1 k0 k1 j0
    x = _swap_bits(x, 0x00CC00CC, 6)  # 1 and 3: j2 k1 k0 j1 j0
    x = _swap_bits(x, 0x0000F0F0, 12)  # 2 and 4: k0 k1 j2 j1 j0
    x = _swap_bits(x, 0x0000FF00, 8)  # 3 and 4: k1 k0 j2 j1 j0
    return x


@jit
def pack_q5_0(src, dst, lane):
    store_u16(dst + 2 * lane, load_u16(src))
    store_u32(dst + 16 + 4 * lane, _fifth_bits(load_u32(src + 2)))
    _pack_words(src + 6, dst + 48, lane, 4)


@jit
def pack_q5_1(src, dst, lane):
    store_u16(dst + 2 * lane, load_u16(src))
    store_u16(dst + 16 + 2 * lane, load_u16(src + 2))
    store_u32(dst + 32 + 4 * lane, _fifth_bits(load_u32(src + 4)))
    _pack_words(src + 8, dst + 64, lane, 4)


@jit
def five_bits(p, k, lane):
    """Element k of 32 whose fifth bits are at p and nibbles behind them."""
    high = u32(load_u8(p + 4 * lane + (k & 3))) >> u32(k >> 2) & u32(1)
    return nibble(p + 32, k, lane) | (high << u32(4))


@jit
def value_q5_0(p, k, lane):
    return load_f16(p + 2 * lane) * f32(np.int32(five_bits(p + 16, k, lane)) - np.int32(16))


@jit
def value_q5_1(p, k, lane):
    return load_f16(p + 2 * lane) * f32(five_bits(p + 32, k, lane)) + load_f16(p + 16 + 2 * lane)


def _five_bit_dots(isa, n, load):
    """Two functions that each add four dots: the low and the high half of 32 elements."""
    assert isa.narrow_dots(31) >= 4
    dot = isa.narrow_dot

    @jit
    def low(p, q, stride, acc):
        fifth = load(p)
        for j in range(4):
            v = and_i(load(p + 32 + 32 * j), splat_u8(15))
            v = or_i(v, and_i(words_left(fifth, 4 - j), splat_u8(16)))
            acc = dot(acc, v, q + 4 * j, stride)
        return acc

    @jit
    def high(p, q, stride, acc):
        fifth = load(p)
        for j in range(4):
            v = shift_right(load(p + 32 + 32 * j), 4)
            v = or_i(v, and_i(words_right(fifth, j), splat_u8(16)))
            acc = dot(acc, v, q + 4 * j + 16, stride)
        return acc

    return low, high


def five_bit_total(isa, n, load, offset):
    """The dot of 32 elements in int32, plus offset times the sum of x."""
    low, high = _five_bit_dots(isa, n, load)
    start, finish = _start_with(isa, n, offset)
    zero, total = isa.narrow_zero, isa.narrow_sum

    @jit
    def in_one(p, q, stride):
        return total(high(p, q, stride, low(p, q, stride, start(q + A32_SUMS, stride))))

    @jit
    def in_halves(p, q, stride):
        first = finish(low(p, q, stride, zero(n)), q + A32_SUMS, stride)
        return add_i(first, total(high(p, q, stride, zero(n))))

    return in_one if isa.narrow_is_wide else in_halves


def accumulate_q5_0(isa, n, load):
    total = five_bit_total(isa, n, load, -16)

    @jit
    def add(p, q, stride, acc):
        d = mul_f(load_f16x8(p), load_splats_f32(q + A32_D, stride, n))
        return fma(d, to_f32(total(p + 16, q, stride)), acc)

    return add


def accumulate_q5_1(isa, n, load):
    total, with_min = five_bit_total(isa, n, load, 0), _with_min(n)

    @jit
    def add(p, q, stride, acc):
        return with_min(p, q, stride, total(p + 32, q, stride), acc)

    return add


# -- 32 columns, bytes: Q8_0 ---------------------------------------------------------------------


@jit
def pack_q8_0(src, dst, lane):
    store_u16(dst + 2 * lane, load_u16(src))
    for j in range(8):
        store_u32(dst + 16 + 32 * j + 4 * lane, load_u32(src + 2 + 4 * j) ^ u32(0x80808080))


@jit
def value_q8_0(p, k, lane):
    b = load_u8(p + 16 + ((k >> 2) << 5) + 4 * lane + (k & 3))
    return load_f16(p + 2 * lane) * f32(np.int32(b) - np.int32(128))


def accumulate_q8_0(isa, n, load):
    byte_dot, pair_dot, excess = isa.byte_dot, isa.pair_dot, isa.byte_excess

    @jit
    def add(p, q, stride, acc):
        dot = zeros_i32(n)
        if excess:
            dot = pair_dot(dot, splat_i16(-128), q + A32_SUMS, stride)
        for j in range(8):
            dot = byte_dot(dot, load(p + 16 + 32 * j), q + 4 * j, stride)
        d = mul_f(load_f16x8(p), load_splats_f32(q + A32_D, stride, n))
        return fma(d, to_f32(dot), acc)

    return add
