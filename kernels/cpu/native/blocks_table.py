"""Weight types whose nibbles are places in a table of 16 values: IQ4_NL, IQ4_XS, MXFP4.

Knows nothing of matmuls; `formats.py` says what pack, accumulate and value mean. A nibble becomes
its value by one byte shuffle for 32 weights of 8 rows, before any token is multiplied.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from edgeinfer.kernels.cpu.layout import A32_D, A32_SUMS
from edgeinfer.kernels.cpu.native.blocks32 import nibble, pack_q4_0
from edgeinfer.kernels.cpu.native.simd import (
    F32,
    add_i,
    and_i,
    bits_f32,
    fma,
    load_f16,
    load_f16x8,
    load_i8,
    load_i8x8,
    load_splats_f32,
    load_u8,
    load_u8x8,
    load_u16,
    load_u32,
    mapped,
    mul_f,
    scalar,
    shift_left,
    shift_right,
    splat_i16,
    splat_i32,
    splat_u8,
    store_i8,
    store_u8,
    store_u16,
    store_u32,
    sub_i,
    to_f32,
    zeros_i32,
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


def _iq4_total(isa, n, load):
    """The dot of 32 elements whose nibbles lie at p, in int32."""
    excess, pair_dot, dot = isa.byte_excess, isa.pair_dot, isa.table_dot
    look_up = isa.look_up(tuple(v + excess for v in IQ4_VALUES))

    @jit
    def total(p, q, stride):
        acc = zeros_i32(n)
        if excess:
            acc = pair_dot(acc, splat_i16(-excess), q + A32_SUMS, stride)
        for j in range(4):
            v = load(p + 32 * j)
            acc = dot(acc, look_up(and_i(v, splat_u8(15))), q + 4 * j, stride)
            acc = dot(acc, look_up(shift_right(v, 4)), q + 4 * j + 16, stride)
        return acc

    return total


def accumulate_iq4_nl(isa, n, load):
    total = _iq4_total(isa, n, load)

    @jit
    def add(p, q, stride, acc):
        d = mul_f(load_f16x8(p), load_splats_f32(q + A32_D, stride, n))
        return fma(d, to_f32(total(p + 16, q, stride)), acc)

    return add


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


def accumulate_iq4_xs(isa, n, load):
    total = _iq4_total(isa, n, load)

    @jit
    def add(p, q, stride, acc):
        d = load_f16x8(p)
        for s in range(8):
            scale = mul_f(d, to_f32(load_i8x8(p + 16 + 8 * s)))
            scale_x = mul_f(scale, load_splats_f32(q + A32_D, stride, n))
            acc = fma(scale_x, to_f32(total(p + 80 + 128 * s, q, stride)), acc)
            q += n * stride
        return acc

    return add


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


def _e2m1_total(isa, n, load):
    """The dot of 32 elements whose nibbles lie at p, in int32."""
    assert isa.narrow_dots(2 * _SHIFT) >= 4
    zero, total, dot, pair_dot = isa.narrow_zero, isa.narrow_sum, isa.narrow_dot, isa.pair_dot
    look_up = isa.look_up(tuple(v + _SHIFT for v in E2M1_DOUBLED))

    @jit
    def half(p, q, stride, acc):
        """Four dots, for which int16 is wide enough."""
        for j in range(2):
            v = load(p + 32 * j)
            acc = dot(acc, look_up(and_i(v, splat_u8(15))), q + 4 * j, stride)
            acc = dot(acc, look_up(shift_right(v, 4)), q + 4 * j + 16, stride)
        return acc

    @jit
    def in_one(p, q, stride):
        acc = pair_dot(zero(n), splat_i16(-_SHIFT), q + A32_SUMS, stride)
        return half(p + 64, q + 8, stride, half(p, q, stride, acc))

    @jit
    def in_halves(p, q, stride):
        first = total(half(p, q, stride, zero(n)))
        first = pair_dot(first, splat_i16(-_SHIFT), q + A32_SUMS, stride)
        return add_i(first, total(half(p + 64, q + 8, stride, zero(n))))

    return in_one if isa.narrow_is_wide else in_halves


def accumulate_mxfp4(isa, n, load):
    total = _e2m1_total(isa, n, load)

    @jit
    def add(p, q, stride, acc):
        d = mul_f(_powers(load_u8x8(p)), load_splats_f32(q + A32_D, stride, n))
        return fma(d, to_f32(total(p + 8, q, stride)), acc)

    return add
