"""Weight types whose nibbles are places in a table of 16 values: IQ4_NL, IQ4_XS, MXFP4.

Knows nothing of matmuls; `formats.py` says what pack and value mean, `grid.py` what a product is. A
nibble becomes its value by one byte shuffle for 32 weights of 8 rows, before any token is
multiplied.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from edgeinfer.kernels.cpu.native.blocks32 import (
    nibble,
    nibbles,
    pack_q4_0,
    scaled,
    scaled_bytes,
)
from edgeinfer.kernels.cpu.native.fields import at_places, bytes_at
from edgeinfer.kernels.cpu.native.grid import Product
from edgeinfer.kernels.cpu.native.operations import (
    add_i,
    bits_f32,
    load_f16x8,
    load_i8x8,
    load_u8x8,
    mul_f,
    shift_left,
    splat_i32,
    sub_i,
    to_f32,
)
from edgeinfer.kernels.cpu.native.simd import F32, mapped, scalar
from edgeinfer.kernels.cpu.native.words import (
    load_f16,
    load_i8,
    load_u8,
    load_u16,
    load_u32,
    store_i8,
    store_u8,
    store_u16,
    store_u32,
)
from edgeinfer.quant import E2M1_DOUBLED, IQ4_VALUES

jit = njit(error_model="numpy")
u32, f32 = np.uint32, np.float32

_larger_i32 = mapped(2, lambda v, w: v, lambda b, x, y: b.select(b.icmp_signed(">", x, y), x, y))
_float_of_bits = scalar(types.float32, (types.int32,), lambda b, x: b.bitcast(x, F32))


def _entry(table):
    """entry(place) of a table as a float: bytes of two words, so that nothing is in memory."""
    low, high = (
        np.uint64(sum((v + 128) << 8 * i for i, v in enumerate(half)))
        for half in (table[:8], table[8:])
    )

    @jit
    def entry(place):
        word = high if place & u32(8) else low
        byte = (word >> np.uint64(8 * (place & u32(7)))) & np.uint64(255)
        return f32(np.int32(byte) - np.int32(128))

    return entry


_iq4, _e2m1 = _entry(IQ4_VALUES), _entry(E2M1_DOUBLED)


# -- 32 columns: IQ4_NL --------------------------------------------------------------------------

pack_iq4_nl = pack_q4_0  # the same bytes with another meaning


@jit
def value_iq4_nl(p, k, lane):
    return load_f16(p + 2 * lane) * _iq4(nibble(p + 16, k, lane))


def _iq4_quads(isa, load):
    """Quads 0 to 7 of 32 columns whose nibbles are at p, in the form of `byte_dots`."""
    quads, parts = nibbles(load), bytes_at(isa, IQ4_VALUES)

    @jit
    def unpack(p):
        a, b, c, d, e, f, g, h = quads(p)
        first = parts(a) + parts(b) + parts(c) + parts(d)
        return first + parts(e) + parts(f) + parts(g) + parts(h)

    return unpack


def product_iq4_nl(isa, load):
    quads = _iq4_quads(isa, load)

    @jit
    def unpack(p, i):
        return (load_f16x8(p),) + quads(p + 16)

    return Product(1 + 8 * len(isa.byte_form(0)), unpack, scaled_bytes)


# -- 256 columns, sub-blocks of 32 with a scale of 6 bits: IQ4_XS --------------------------------


@jit
def pack_iq4_xs(src, dst, lane):
    store_u16(dst + 2 * lane, load_u16(src))
    high = u32(load_u16(src + 2))
    for s in range(8):
        low = (u32(load_u8(src + 4 + (s >> 1))) >> u32(4 * (s & 1))) & u32(15)
        scale = low | (((high >> u32(2 * s)) & u32(3)) << u32(4))
        store_i8(dst + 16 + 8 * s + lane, np.int32(scale) - np.int32(32))
        for j in range(4):
            to = dst + 80 + 128 * s + 32 * j + 4 * lane
            store_u32(to, load_u32(src + 8 + 16 * s + 4 * j))


@jit
def value_iq4_xs(p, k, lane):
    s = k >> 5
    scale = load_f16(p + 2 * lane) * f32(load_i8(p + 16 + 8 * s + lane))
    return scale * _iq4(nibble(p + 80 + 128 * s, k & 31, lane))


def product_iq4_xs(isa, load):
    quads = _iq4_quads(isa, load)

    @jit
    def unpack(p, i):
        scale = mul_f(load_f16x8(p), to_f32(load_i8x8(p + 16 + 8 * i)))
        return (scale,) + quads(p + 80 + 128 * i)

    return Product(1 + 8 * len(isa.byte_form(0)), unpack, scaled_bytes)


# -- 32 columns with a power of two: MXFP4 -------------------------------------------------------

_SHIFT = 12  # makes every doubled value unsigned: 0 to 24


@jit
def pack_mxfp4(src, dst, lane):
    store_u8(dst + lane, u32(load_u8(src)))
    for j in range(4):
        store_u32(dst + 8 + 32 * j + 4 * lane, load_u32(src + 1 + 4 * j))


@jit
def value_mxfp4(p, k, lane):
    e = np.int64(load_u8(p + lane))
    bits = max((e - 1) << 23, (e + 1) << 21)
    return _float_of_bits(np.int32(bits)) * _e2m1(nibble(p + 8, k, lane))


@jit
def _powers(e):
    """2^(e - 128): from e = 2 on the first is larger; 2^-127 and 2^-128 are denormal."""
    normal = sub_i(shift_left(e, 23), splat_i32(1 << 23))
    denormal = add_i(shift_left(e, 21), splat_i32(1 << 21))
    return bits_f32(_larger_i32(normal, denormal))


def product_mxfp4(isa, load):
    quads, entries = nibbles(load), at_places(isa, [v + _SHIFT for v in E2M1_DOUBLED])

    @jit
    def unpack(p, i):
        a, b, c, d, e, f, g, h = quads(p + 8)
        first = entries(a), entries(b), entries(c), entries(d)
        return (_powers(load_u8x8(p)),) + first + (entries(e), entries(f), entries(g), entries(h))

    return Product(9, unpack, scaled(2 * _SHIFT, -_SHIFT))
