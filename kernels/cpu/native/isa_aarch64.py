"""AArch64's dot product instructions, and its way to pause and to set the float mode.

Knows no quant type. `isa.py` says what each word of a family means.
"""

from __future__ import annotations

from dataclasses import replace

from llvmlite import ir
from numba import types

from edgeinfer.kernels.cpu.native import simd
from edgeinfer.kernels.cpu.native.isa import GENERIC, splat
from edgeinfer.kernels.cpu.native.simd import I8, I32, I64, call, const_ir, u8x32

_I8x16, _I32x4 = ir.VectorType(I8, 16), ir.VectorType(I32, 4)
_QUANTS = 32  # bytes of a block of activations that dots read
_YIELD = 1  # its number among the hints


def _lanes(b, v, start, n):
    mask = ir.Constant(ir.VectorType(I32, n), list(range(start, start + n)))
    return b.shuffle_vector(v, v, mask)


def _sdot(b, acc, w, x):
    """Signed bytes times signed bytes, four at a time, 4 rows per instruction."""
    x = _lanes(b, x, 0, 16)
    halves = [
        call(b, "ei.aarch64.sdot", _I32x4, _lanes(b, acc, 4 * i, 4), _lanes(b, w, 16 * i, 16), x)
        for i in (0, 1)
    ]
    return simd.joined_ir(b, halves)


def _pair_dot(b, total, pairs, x):
    """Four products an instruction, and each row's two added."""
    x = _lanes(b, b.bitcast(x, pairs.type), 0, 4)
    products = [
        call(b, "ei.aarch64.smull", _I32x4, _lanes(b, pairs, 4 * i, 4), x) for i in range(4)
    ]
    halves = [call(b, "ei.aarch64.addp", _I32x4, *products[i : i + 2]) for i in (0, 2)]
    return b.add(total, simd.joined_ir(b, halves))


def _signed(b, u):
    """u = w + 128 with its top bit turned is w, which fits in a signed byte."""
    return (b.xor(u, const_ir(u8x32, -128)),)


def _look_up(b, table, v):
    entries = ir.Constant(_I8x16, list(table))
    halves = [call(b, "ei.aarch64.tbl", _I8x16, entries, _lanes(b, v, 16 * i, 16)) for i in (0, 1)]
    return simd.joined_ir(b, halves)


def _splat(b, x, start, at, lanes):
    """Of 16 bytes, loaded once: `sdot` takes one of their words by its number."""
    if at >= _QUANTS:
        return splat(b, x, start, at, lanes)
    words = simd.load_ir(b, b.add(x, I64(start + (at & -16))), _I32x4)
    which = ir.Constant(ir.VectorType(I32, lanes), [at // 4 % 4] * lanes)
    return b.shuffle_vector(words, words, which)


def _emit_pause(b):
    call(b, "ei.aarch64.hint", ir.VoidType(), I32(_YIELD))


def _emit_reset_float(b):
    call(b, "ei.aarch64.set_fpcr", ir.VoidType(), I64(0))


# 32 registers of 16 bytes: 16 of the vectors that kernels speak of.
NEON = replace(
    GENERIC,
    name="neon",
    narrow_dot=_sdot,
    short_first=GENERIC.scale_first,
    short_second=GENERIC.scale_second,
    add_short=GENERIC.add_scaled,
    pair_dot=_pair_dot,
    byte_form=lambda w: (w,),
    byte_parts=_signed,
    byte_dot=lambda b, acc, parts, x: _sdot(b, acc, *parts, x),
    byte_excess=0,
    look_up=_look_up,
    splat=_splat,
    pause=simd.scalar(types.void, (), _emit_pause),
    reset_float=simd.scalar(types.void, (), _emit_reset_float),
)
