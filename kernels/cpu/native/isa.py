"""The integer dot product of each instruction-set family, under the same names for all of them.

Knows no quant type. A family offers, for 32 unsigned bytes u (8 rows x 4) and four signed bytes
of each token's activations:

- `narrow_zero(n)`, `narrow_dot(acc, u, x, stride)`, `narrow_sum(acc)`: for u <= 15, at most eight
  dots between zero and sum (8 * 2 * 15 * 127 fits in int16 where the family sums there);
- `wide_dot(acc, u, x, stride)`: for u <= 127, into int32 lanes, any number of times;
- `signed_dot(acc, w, x, stride)`: for signed bytes w > -128.

Lane r of a sum belongs to row r; token i's activations lie at x + i * stride. All are exact, so
every family gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgeinfer.kernels.cpu.native import simd
from edgeinfer.kernels.cpu.native.simd import (
    I16,
    I32,
    Tile,
    call,
    const_ir,
    i16x16,
    i32x8,
    intp,
    load_ir,
    mapped,
    offset_ir,
    splat_ir,
    tile_ir,
    u8x32,
)

_I8x32, _I16x16, _I32x8 = u8x32.ir, i16x16.ir, i32x8.ir


@dataclass(frozen=True)
class Isa:
    """One family's vocabulary; see the module docstring."""

    name: str
    narrow_zero: Callable
    narrow_dot: Callable
    narrow_sum: Callable
    wide_dot: Callable
    signed_dot: Callable
    pause: Callable
    reset_float: Callable  # round to nearest, denormals kept, whatever this thread had before


def _broadcast(b, x, stride, i):
    """Four activation bytes of token i in every 32-bit lane."""
    return b.bitcast(splat_ir(b, load_ir(b, offset_ir(b, x, stride, i), I32), 8), _I8x32)


def _per_token(emit):
    """`dot(acc, w, x, stride)`: `emit` for each token, its activations loaded next to their use."""

    @intrinsic
    def dot(typingctx, acc, w, x, stride):
        if not isinstance(acc, Tile):
            return None

        def codegen(context, builder, signature, values):
            acc_value, weights, address, step = values
            address = context.cast(builder, address, signature.args[2], intp)
            step = context.cast(builder, step, signature.args[3], intp)
            rows = (
                emit(
                    builder,
                    builder.extract_value(acc_value, i),
                    weights,
                    _broadcast(builder, address, step, i),
                )
                for i in range(acc.n)
            )
            return tile_ir(builder, acc, rows)

        return acc(acc, w, x, stride), codegen

    return dot


# -- AVX2: pairs into int16, then into int32 -----------------------------------------------------


def _pairs(b, u, s):
    """vpmaddubsw: unsigned times signed bytes, neighbours added with saturation into int16."""
    return call(b, "ei.x86.pmaddubsw", _I16x16, u, s)


def _widen(b, v):
    return call(b, "ei.x86.pmaddwd", _I32x8, v, const_ir(i16x16, 1))


def _absolute(b, w):
    zero = const_ir(u8x32, 0)
    return b.select(b.icmp_signed("<", w, zero), b.sub(zero, w), w)


def _negated_where_negative(b, x, w):
    zero = const_ir(u8x32, 0)
    return b.select(b.icmp_signed("<", w, zero), b.sub(zero, x), x)


def _signed_avx2(b, acc, w, x):
    pairs = _pairs(b, _absolute(b, w), _negated_where_negative(b, x, w))
    return b.add(acc, _widen(b, pairs))


_MXCSR_DEFAULT = 0x1F80


def _emit_reset_float(b):
    slot = b.alloca(I32)
    b.store(I32(_MXCSR_DEFAULT), slot)
    call(b, "ei.x86.ldmxcsr", ir.VoidType(), slot)


_pause_x86 = simd.scalar(
    types.void, (), lambda b: (call(b, "ei.x86.pause", ir.VoidType()), None)[1]
)
_reset_float_x86 = simd.scalar(types.void, (), _emit_reset_float)

AVX2 = Isa(
    "avx2",
    narrow_zero=simd.zeros_i16,
    narrow_dot=_per_token(lambda b, acc, u, x: b.add(acc, _pairs(b, u, x))),
    narrow_sum=mapped(1, lambda v: i32x8, _widen),
    wide_dot=_per_token(lambda b, acc, u, x: b.add(acc, _widen(b, _pairs(b, u, x)))),
    signed_dot=_per_token(_signed_avx2),
    pause=_pause_x86,
    reset_float=_reset_float_x86,
)


# -- AVX-VNNI and AVX-512 VNNI: one instruction into int32 ---------------------------------------


def _vpdpbusd(b, acc, u, s):
    return call(b, "ei.x86.vpdpbusd", _I32x8, acc, u, s)


def _signed_vnni(b, acc, w, x):
    return _vpdpbusd(b, acc, _absolute(b, w), _negated_where_negative(b, x, w))


VNNI = Isa(
    "vnni",
    narrow_zero=simd.zeros_i32,
    narrow_dot=_per_token(_vpdpbusd),
    narrow_sum=mapped(1, lambda v: i32x8, lambda b, v: v),
    wide_dot=_per_token(_vpdpbusd),
    signed_dot=_per_token(_signed_vnni),
    pause=_pause_x86,
    reset_float=_reset_float_x86,
)


# -- any machine: plain vector arithmetic --------------------------------------------------------


def _dot4(b, acc, w, x, extend):
    """Widen to int16, multiply, add the four products of each row."""
    products = b.mul(
        extend(w, ir.VectorType(I16, 32)), b.sext(x, ir.VectorType(I16, 32))
    )
    wide = b.sext(products, ir.VectorType(I32, 32))
    for k in range(4):
        lanes = ir.Constant(ir.VectorType(I32, 8), [4 * r + k for r in range(8)])
        acc = b.add(acc, b.shuffle_vector(wide, wide, lanes))
    return acc


_generic_unsigned = _per_token(lambda b, acc, u, x: _dot4(b, acc, u, x, b.zext))

GENERIC = Isa(
    "generic",
    narrow_zero=simd.zeros_i32,
    narrow_dot=_generic_unsigned,
    narrow_sum=mapped(1, lambda v: i32x8, lambda b, v: v),
    wide_dot=_generic_unsigned,
    signed_dot=_per_token(lambda b, acc, w, x: _dot4(b, acc, w, x, b.sext)),
    pause=simd.scalar(types.void, (), lambda b: None),
    reset_float=simd.scalar(types.void, (), lambda b: None),
)

FAMILIES = {isa.name: isa for isa in (AVX2, VNNI, GENERIC)}
