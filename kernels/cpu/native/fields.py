"""Small fields of packed weight blocks: pairs of scale bytes, bits shifted into place.

Knows no quant type and no instruction set.
"""

from __future__ import annotations

from llvmlite import ir
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
)

# Two bytes of each of 8 rows, widened.
load_u8_pairs = scalar(i16x16, (intp,), lambda b, p: b.zext(load_ir(b, p, u8x16.ir), i16x16.ir))
load_i8_pairs = scalar(i16x16, (intp,), lambda b, p: b.sext(load_ir(b, p, u8x16.ir), i16x16.ir))


def _twice(first):
    """Both halves of every pair become one of them."""
    mask = ir.Constant(ir.VectorType(I32, 16), [i // 2 * 2 + first for i in range(16)])
    return mapped(1, lambda v: v, lambda b, x: b.shuffle_vector(x, x, mask))


first_twice = _twice(0)
second_twice = _twice(1)

# Every int16 of a vector of bytes times an int16.
mul_words = mapped(
    2, lambda v, w: v, lambda b, x, y: b.bitcast(b.mul(b.bitcast(x, i16x16.ir), y), x.type)
)


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
