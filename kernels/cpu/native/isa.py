"""The integer dot product of each instruction-set family, under the same names for all of them.

Knows no quant type. A family offers, for 32 unsigned bytes u (8 rows x 4) and four signed bytes
of each token's activations:

- `narrow_zero(n)`, `narrow_dot(acc, u, x, stride)`, `narrow_sum(acc)`: for u <= 63, at most
  `narrow_dots(largest u)` dots between zero and sum, because a family may add in int16;
- `scale_first(pairs)`, `scale_second(pairs)`, `add_scaled(total, acc, scale)`: total + scale *
  narrow_sum(acc), the scale of each row being one of a pair of int16; `short_first`,
  `short_second` and `add_short`: the same where narrow_sum(acc) fits in int16;
- `pair_dot(total, pairs, x, stride)`: two int16 of each row times two int16 of each token;
- `byte_dot(acc, u, x, stride)`: for weights stored as u = w + 128, the dot product of
  w + `byte_excess` and x, which is 0 or 128;
- `look_up(table)(v)`: for places v of 0 to 15, the bytes that a table of 16 holds there;
- `table_dot(acc, t, x, stride)`: for bytes t = w + `byte_excess` of a table, |w| at most 127, the
  dot product of t and x.

Lane r of a sum belongs to row r; token i's activations lie at x + i * stride. All are exact, so
every family gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgeinfer.kernels.cpu.native import fields, simd
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
    registers: int  # vector registers that a kernel may count on
    narrow_zero: Callable
    narrow_dot: Callable
    narrow_sum: Callable
    narrow_dots: Callable[[int], int]
    narrow_is_wide: bool  # the sums are int32 from the start
    scale_first: Callable
    scale_second: Callable
    add_scaled: Callable
    short_first: Callable
    short_second: Callable
    add_short: Callable
    pair_dot: Callable
    byte_dot: Callable
    byte_excess: int
    look_up: Callable
    table_dot: Callable
    pause: Callable
    reset_float: Callable  # round to nearest, denormals kept, whatever this thread had before


def _first(*vecs):
    return vecs[0]


def _broadcast(b, x, stride, i):
    """Four activation bytes of token i in every 32-bit lane."""
    return b.bitcast(splat_ir(b, load_ir(b, offset_ir(b, x, stride, i), I32), 8), _I8x32)


def _per_token(emit):
    """`dot(acc, w, x, stride)`: `emit` for each token, its activations loaded next to their use.

    Of a tuple of weights, the next one meets the next four bytes; a token's dots follow each other,
    which leaves one sum alive at a time instead of one for each token.
    """

    @intrinsic
    def dot(typingctx, acc, w, x, stride):
        if not isinstance(acc, Tile):
            return None

        def codegen(context, builder, signature, values):
            acc_value, weights, address, step = values
            address = context.cast(builder, address, signature.args[2], intp)
            step = context.cast(builder, step, signature.args[3], intp)
            parts = [weights]
            if isinstance(w, types.BaseTuple):
                parts = [builder.extract_value(weights, j) for j in range(w.count)]
            rows = []
            for i in range(acc.n):
                row, at = builder.extract_value(acc_value, i), address
                for part in parts:
                    row = emit(builder, row, part, _broadcast(builder, at, step, i))
                    at = builder.add(at, simd.I64(4))
                rows.append(row)
            return tile_ir(builder, acc, rows)

        return acc(acc, w, x, stride), codegen

    return dot


# -- AVX2: pairs into int16, then into int32 -----------------------------------------------------


def _pairs(b, u, s):
    """vpmaddubsw: unsigned times signed bytes, neighbours added with saturation into int16."""
    return call(b, "ei.x86.pmaddubsw", _I16x16, u, s)


def _pmaddwd(b, v, w):
    return call(b, "ei.x86.pmaddwd", _I32x8, v, w)


def _widen(b, v):
    return _pmaddwd(b, v, const_ir(i16x16, 1))


def _add_pmaddwd(b, acc, v, w):
    return b.add(acc, _pmaddwd(b, v, w))


def _byte_avx2(b, acc, u, x):
    """|w| times x with the sign of w: 128 * 127 * 2 just fits in int16."""
    w = b.xor(u, const_ir(u8x32, -128))
    negative = b.ashr(w, const_ir(u8x32, 7))
    size, signed = (b.sub(b.xor(v, negative), negative) for v in (w, x))
    return b.add(acc, _widen(b, _pairs(b, size, signed)))


def _signed_avx2(b, acc, w, x):
    """The same, the sign by one instruction per token."""
    size = call(b, "llvm.abs.v32i8", _I8x32, w, simd.I1(0))
    signed = call(b, "ei.x86.psignb", _I8x32, x, w)
    return b.add(acc, _widen(b, _pairs(b, size, signed)))


def _look_up_x86(table):
    both = ir.Constant(_I8x32, list(table) * 2)  # each half of a register has its own
    return mapped(1, _first, lambda b, v: call(b, "ei.x86.pshufb", _I8x32, both, v))


def _pair_dot(emit):
    return _per_token(lambda b, acc, w, x: emit(b, acc, w, b.bitcast(x, _I16x16)))


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
    16,
    narrow_zero=simd.zeros_i16,
    narrow_dot=_per_token(lambda b, acc, u, x: b.add(acc, _pairs(b, u, x))),
    narrow_sum=mapped(1, lambda v: i32x8, _widen),
    narrow_dots=lambda u: 32767 // (2 * 127 * u),
    narrow_is_wide=False,
    scale_first=fields.first_twice,
    scale_second=fields.second_twice,
    add_scaled=mapped(3, _first, _add_pmaddwd),
    short_first=fields.first_twice,
    short_second=fields.second_twice,
    add_short=mapped(3, _first, _add_pmaddwd),
    pair_dot=_pair_dot(_add_pmaddwd),
    byte_dot=_per_token(_byte_avx2),
    byte_excess=0,
    look_up=_look_up_x86,
    table_dot=_per_token(_signed_avx2),
    pause=_pause_x86,
    reset_float=_reset_float_x86,
)


# -- AVX-VNNI and AVX-512 VNNI: one instruction into int32 ---------------------------------------


def _vpdpbusd(b, acc, u, s):
    return call(b, "ei.x86.vpdpbusd", _I32x8, acc, u, s)


def _vpdpwssd(b, acc, v, w):
    return call(b, "ei.x86.vpdpwssd", _I32x8, acc, v, w)


def _first_word(b, pairs):
    sixteen = const_ir(i32x8, 16)
    return b.ashr(b.shl(b.bitcast(pairs, _I32x8), sixteen), sixteen)


def _second_word(b, pairs):
    return b.ashr(b.bitcast(pairs, _I32x8), const_ir(i32x8, 16))


def _first_alone(b, pairs):
    return b.and_(b.bitcast(pairs, _I32x8), const_ir(i32x8, 0xFFFF))


def _second_alone(b, pairs):
    return b.lshr(b.bitcast(pairs, _I32x8), const_ir(i32x8, 16))


# What families that add in int32 from the start have in common.
_WORDS = dict(
    narrow_zero=simd.zeros_i32,
    narrow_sum=mapped(1, _first, lambda b, acc: acc),
    narrow_dots=lambda u: 256,
    narrow_is_wide=True,
    scale_first=mapped(1, lambda v: i32x8, _first_word),
    scale_second=mapped(1, lambda v: i32x8, _second_word),
    add_scaled=mapped(3, _first, lambda b, total, acc, s: b.add(total, b.mul(acc, s))),
    short_first=mapped(1, lambda v: i32x8, _first_alone),
    short_second=mapped(1, lambda v: i32x8, _second_alone),
    byte_excess=128,
)


def _add_short_vnni(b, total, acc, s):
    """One instruction: the upper halves are multiplied by zero."""
    return _vpdpwssd(b, total, b.bitcast(acc, _I16x16), b.bitcast(s, _I16x16))


VNNI = Isa(
    "vnni",
    16,
    **_WORDS,
    narrow_dot=_per_token(_vpdpbusd),
    add_short=mapped(3, _first, _add_short_vnni),
    pair_dot=_pair_dot(_vpdpwssd),
    byte_dot=_per_token(_vpdpbusd),
    look_up=_look_up_x86,
    table_dot=_per_token(_vpdpbusd),
    pause=_pause_x86,
    reset_float=_reset_float_x86,
)


AVX512 = replace(VNNI, name="avx512", registers=32)  # the same instructions, more registers


# -- any machine: plain vector arithmetic --------------------------------------------------------


def _dot4(b, acc, u, x):
    """Multiply in int16, which 255 * 127 fits, and add the four products of each row."""
    kind = ir.VectorType(I16, 32)
    products = b.sext(b.mul(b.zext(u, kind), b.sext(x, kind)), ir.VectorType(I32, 32))
    for k in range(4):
        lanes = ir.Constant(ir.VectorType(I32, 8), [4 * r + k for r in range(8)])
        acc = b.add(acc, b.shuffle_vector(products, products, lanes))
    return acc


def _dot2(b, acc, w, x):
    first = b.mul(_first_word(b, w), _first_word(b, x))
    second = b.mul(_second_word(b, w), _second_word(b, x))
    return b.add(acc, b.add(first, second))


def _add_short_generic(b, total, acc, s):
    return b.add(total, b.mul(acc, _first_word(b, s)))


def _look_up_generic(table):
    """Halve the table by each bit of the place."""

    def emit(b, v):
        left, one = [const_ir(u8x32, entry) for entry in table], const_ir(u8x32, 1)
        for bit in range(4):
            is_set = b.and_(b.lshr(v, const_ir(u8x32, bit)), one)
            mask = b.sub(const_ir(u8x32, 0), is_set)
            pairs = zip(left[::2], left[1::2], strict=True)
            left = [b.xor(x, b.and_(b.xor(x, y), mask)) for x, y in pairs]
        return left[0]

    return mapped(1, _first, emit)


GENERIC = Isa(
    "generic",
    16,
    **_WORDS,
    narrow_dot=_per_token(_dot4),
    add_short=mapped(3, _first, _add_short_generic),
    pair_dot=_pair_dot(_dot2),
    byte_dot=_per_token(_dot4),
    look_up=_look_up_generic,
    table_dot=_per_token(_dot4),
    pause=simd.scalar(types.void, (), lambda b: None),
    reset_float=simd.scalar(types.void, (), lambda b: None),
)

FAMILIES = {isa.name: isa for isa in (AVX2, VNNI, AVX512, GENERIC)}
