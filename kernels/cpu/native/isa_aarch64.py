"""AArch64's dot product instructions, and its way to pause and to set the float mode.

Knows no quant type. `isa.py` says what each word of a family means.
"""

from __future__ import annotations

from dataclasses import replace

from llvmlite import ir
from numba import types

from edgeinfer.kernels.cpu.native import simd
from edgeinfer.kernels.cpu.native.isa import GENERIC
from edgeinfer.kernels.cpu.native.simd import I8, I32, I64, call, const_ir, u8x32

_I8x16, _I32x4 = ir.VectorType(I8, 16), ir.VectorType(I32, 4)
_YIELD = 1  # its number among the hints


def _lanes(b, v, start, n):
    mask = ir.Constant(ir.VectorType(I32, n), list(range(start, start + n)))
    return b.shuffle_vector(v, v, mask)


def _sdot(b, acc, w, x):
    """Signed bytes times signed bytes, four at a time, 4 rows per instruction."""
    x = _lanes(b, x, 0, 16)
    low, high = (
        call(b, "ei.aarch64.sdot", _I32x4, _lanes(b, acc, 4 * i, 4), _lanes(b, w, 16 * i, 16), x)
        for i in (0, 1)
    )
    return b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, 8), list(range(8))))


def _signed(b, u):
    """u = w + 128 with its top bit turned is w, which fits in a signed byte."""
    return (b.xor(u, const_ir(u8x32, -128)),)


def _look_up(b, table, v):
    entries = ir.Constant(_I8x16, list(table))
    low, high = (
        call(b, "ei.aarch64.tbl", _I8x16, entries, _lanes(b, v, 16 * i, 16)) for i in (0, 1)
    )
    return b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, 32), list(range(32))))


def _emit_pause(b):
    call(b, "ei.aarch64.hint", ir.VoidType(), I32(_YIELD))


def _emit_reset_float(b):
    call(b, "ei.aarch64.set_fpcr", ir.VoidType(), I64(0))


# 32 registers of 16 bytes: 16 of the vectors that kernels speak of.
NEON = replace(
    GENERIC,
    name="neon",
    narrow_dot=_sdot,
    byte_form=lambda w: (w,),
    byte_parts=_signed,
    byte_dot=lambda b, acc, parts, x: _sdot(b, acc, *parts, x),
    byte_excess=0,
    look_up=_look_up,
    pause=simd.scalar(types.void, (), _emit_pause),
    reset_float=simd.scalar(types.void, (), _emit_reset_float),
)
