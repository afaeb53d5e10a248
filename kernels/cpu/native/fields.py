"""Small fields of packed weight blocks: pairs of scale bytes, bits shifted into place.

Knows no quant type and no instruction set.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgeinfer.kernels.cpu.native.simd import (
    I32,
    i16x16,
    i32x8,
    intp,
    load_ir,
    mapped,
    scalar,
    splat_ir,
    u8x16,
    u8x32,
)

# Two bytes of each of 8 rows, widened.
load_u8_pairs = scalar(i16x16, (intp,), lambda b, p: b.zext(load_ir(b, p, u8x16.ir), i16x16.ir))
load_i8_pairs = scalar(i16x16, (intp,), lambda b, p: b.sext(load_ir(b, p, u8x16.ir), i16x16.ir))


def _twice(first):
    """Emits: both halves of every pair become one of them."""
    mask = ir.Constant(ir.VectorType(I32, 16), [i // 2 * 2 + first for i in range(16)])
    return lambda b, x: b.shuffle_vector(x, x, mask)


first_twice = _twice(0)
second_twice = _twice(1)


def _shift_words(emit):
    """Shift every 32-bit word of a vector by k bits; the caller masks what crosses elements."""

    @intrinsic
    def shift(typingctx, v, k):
        def codegen(context, builder, signature, values):
            count = context.cast(builder, values[1], signature.args[1], intp)
            counts = splat_ir(builder, builder.trunc(count, I32), 8)
            words = builder.bitcast(values[0], i32x8.ir)
            return builder.bitcast(emit(builder, words, counts), v.ir)

        return v(v, k), codegen

    return shift


words_left = _shift_words(lambda b, x, k: b.shl(x, k))
words_right = _shift_words(lambda b, x, k: b.lshr(x, k))


def of_pairs(emit):
    """An operation on pairs of int16 from what a family emits for it; gives bytes."""
    return mapped(1, lambda v: u8x32, lambda b, pairs: b.bitcast(emit(b, pairs), u8x32.ir))


def _parts(n, emit):
    """`parts(v)`: the tuple of the n vectors of bytes that `emit(builder, v)` lists."""

    @intrinsic
    def parts(typingctx, v):
        kind = types.UniTuple(u8x32, n)

        def codegen(context, builder, signature, values):
            return context.make_tuple(builder, kind, emit(builder, values[0]))

        return kind(v), codegen

    return parts


def bytes_of(isa):
    """`parts(u)`: bytes w, stored as u = w + 128, as a family's `byte_dot` takes them."""
    return _parts(len(isa.byte_form(0)), isa.byte_parts)


def bytes_at(isa, table):
    """`parts(v)`: bytes w that a table of 16 holds at v, likewise."""
    tables = list(zip(*map(isa.byte_form, table), strict=True))
    return _parts(len(tables), lambda b, v: [isa.look_up(b, each, v) for each in tables])


def at_places(isa, table):
    """`entries(v)`: the bytes that a table of 16 holds at v."""
    return mapped(1, lambda v: v, lambda b, v: isa.look_up(b, table, v))
