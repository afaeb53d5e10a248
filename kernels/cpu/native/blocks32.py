"""Weight types with blocks of 32 columns: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

Knows nothing of matmuls; `formats.py` says what pack and value mean, `grid.py` what a product
is.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from edgeinfer.kernels.cpu.native.fields import bytes_of, words_left, words_right
from edgeinfer.kernels.cpu.native.grid import Product
from edgeinfer.kernels.cpu.native.operations import (
    and_i,
    fma,
    load_f16x8,
    or_i,
    shift_right,
    splat_u8,
    to_f32,
)
from edgeinfer.kernels.cpu.native.words import (
    load_f16,
    load_u8,
    load_u16,
    load_u32,
    store_u16,
    store_u32,
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


def nibbles(load):
    """Quads 0 to 7 of 32 columns whose quants are at p."""

    @jit
    def unpack(p):
        a, b, c, d = load(p), load(p + 32), load(p + 64), load(p + 96)
        low = splat_u8(15)
        return (
            and_i(a, low), and_i(b, low), and_i(c, low), and_i(d, low),
            shift_right(a, 4), shift_right(b, 4), shift_right(c, 4), shift_right(d, 4),
        )  # fmt: skip

    return unpack


def scaled(largest, offset):
    """acc + d * dx * (dot + offset * sum of x); the fields are d and 8 quads."""

    def add_of(grid):
        scale, dots = grid.scale(0), grid.dots(1, largest, offset)

        @jit
        def add(fields, x, acc):
            dot = to_f32(dots(fields, x))
            return fma(scale(fields, x), dot, acc)

        return add

    return add_of


def scaled_with_low(largest):
    """acc + d * dx * dot + m * (dx * sum of x); the fields are d, m and 8 quads."""

    def add_of(grid):
        scale, add_low, dots = grid.scale(0), grid.add_low(1), grid.dots(2, largest)

        @jit
        def add(fields, x, acc):
            dot = to_f32(dots(fields, x))
            acc = fma(scale(fields, x), dot, acc)
            return add_low(fields, x, acc)

        return add

    return add_of


def product_q4_0(isa, load):
    quads = nibbles(load)

    @jit
    def unpack(p, i):
        return (load_f16x8(p),) + quads(p + 16)

    return Product(9, unpack, scaled(15, -8))


def product_q4_1(isa, load):
    quads = nibbles(load)

    @jit
    def unpack(p, i):
        return (load_f16x8(p), load_f16x8(p + 16)) + quads(p + 32)

    return Product(10, unpack, scaled_with_low(15))


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


def fives(load):
    """Quads 0 to 7 of 32 columns whose fifth bits are at p and nibbles behind them."""
    quads = nibbles(load)

    @jit
    def bit(v):
        return and_i(v, splat_u8(16))

    @jit
    def unpack(p):
        fifth, (a, b, c, d, e, f, g, h) = load(p), quads(p + 32)
        return (
            or_i(a, bit(words_left(fifth, 4))),
            or_i(b, bit(words_left(fifth, 3))),
            or_i(c, bit(words_left(fifth, 2))),
            or_i(d, bit(words_left(fifth, 1))),
            or_i(e, bit(fifth)),
            or_i(f, bit(words_right(fifth, 1))),
            or_i(g, bit(words_right(fifth, 2))),
            or_i(h, bit(words_right(fifth, 3))),
        )

    return unpack


def product_q5_0(isa, load):
    quads = fives(load)

    @jit
    def unpack(p, i):
        return (load_f16x8(p),) + quads(p + 16)

    return Product(9, unpack, scaled(31, -16))


def product_q5_1(isa, load):
    quads = fives(load)

    @jit
    def unpack(p, i):
        return (load_f16x8(p), load_f16x8(p + 16)) + quads(p + 32)

    return Product(10, unpack, scaled_with_low(31))


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


def scaled_bytes(grid):
    """acc + d * dx * dot; the fields are d and 8 quads of signed bytes in a family's form."""
    scale, dots = grid.scale(0), grid.byte_dots(1)

    @jit
    def add(fields, x, acc):
        dot = to_f32(dots(fields, x))
        return fma(scale(fields, x), dot, acc)

    return add


def product_q8_0(isa, load):
    parts = bytes_of(isa)

    @jit
    def unpack(p, i):
        q = p + 16
        first = parts(load(q)) + parts(load(q + 32)) + parts(load(q + 64)) + parts(load(q + 96))
        q += 128
        last = parts(load(q)) + parts(load(q + 32)) + parts(load(q + 64)) + parts(load(q + 96))
        return (load_f16x8(p),) + first + last

    return Product(1 + 8 * len(isa.byte_form(0)), unpack, scaled_bytes)
