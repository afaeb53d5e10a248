"""What the kernels know of each weight type: packing a block, its dot products, one value of it.

Knows nothing of rows, chunks or tiles of a matmul. `edgeinfer.kernels.cpu.formats` describes the
packed blocks, `edgeinfer.quant` the blocks of the file. Vectors have a lane for each of 8 rows,
those of floats 4.

`FORMATS`: how to pack a block and to read a value of it. `PRODUCTS`: `product(isa, load)`, how
packed blocks, read with `load`, meet quantised activations. `FLOATS`: `load(b, p, kind)`, the
instructions that read a vector of a float block as one of floats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir
from numba import njit

from edgeinfer.kernels.cpu.native import blocks32, blocks256, blocks_table
from edgeinfer.kernels.cpu.native.simd import I16, I32, load_f16_ir, load_ir
from edgeinfer.kernels.cpu.native.words import (
    load_bf16,
    load_f16,
    load_f32,
    load_u16,
    load_u32,
    store_u16,
    store_u32,
)

jit = njit(error_model="numpy")


@dataclass(frozen=True)
class Format:
    """`pack(src, dst, lane)` puts one row's block of the file into a packed block;
    `value(p, k, lane)` is element k of a row, as the file's dequantisation rounds it."""

    pack: Callable
    value: Callable


# -- 4 columns of floats: F16, BF16, F32 ---------------------------------------------------------


@jit
def _pack_halves(src, dst, lane):
    for k in range(4):
        store_u16(dst + 8 * lane + 2 * k, load_u16(src + 2 * k))


@jit
def _pack_f32(src, dst, lane):
    for k in range(4):
        store_u32(dst + 16 * lane + 4 * k, load_u32(src + 4 * k))


@jit
def _value_f16(p, k, lane):
    return load_f16(p + 8 * lane + 2 * k)


@jit
def _value_bf16(p, k, lane):
    return load_bf16(p + 8 * lane + 2 * k)


@jit
def _value_f32(p, k, lane):
    return load_f32(p + 16 * lane + 4 * k)


def _load_bf16_ir(b, p, kind):
    words = ir.VectorType(I32, kind.count)
    wide = b.zext(load_ir(b, p, ir.VectorType(I16, kind.count)), words)
    return b.bitcast(b.shl(wide, ir.Constant(words, [16] * kind.count)), kind)


FORMATS = {
    "q4_0": Format(blocks32.pack_q4_0, blocks32.value_q4_0),
    "q4_1": Format(blocks32.pack_q4_1, blocks32.value_q4_1),
    "q5_0": Format(blocks32.pack_q5_0, blocks32.value_q5_0),
    "q5_1": Format(blocks32.pack_q5_1, blocks32.value_q5_1),
    "q8_0": Format(blocks32.pack_q8_0, blocks32.value_q8_0),
    "q2_k": Format(blocks256.pack_q2_k, blocks256.value_q2_k),
    "q3_k": Format(blocks256.pack_q3_k, blocks256.value_q3_k),
    "q4_k": Format(blocks256.pack_q4_k, blocks256.value_q4_k),
    "q5_k": Format(blocks256.pack_q5_k, blocks256.value_q5_k),
    "q6_k": Format(blocks256.pack_q6_k, blocks256.value_q6_k),
    "iq4_nl": Format(blocks_table.pack_iq4_nl, blocks_table.value_iq4_nl),
    "iq4_xs": Format(blocks_table.pack_iq4_xs, blocks_table.value_iq4_xs),
    "mxfp4": Format(blocks_table.pack_mxfp4, blocks_table.value_mxfp4),
    "f16": Format(_pack_halves, _value_f16),
    "bf16": Format(_pack_halves, _value_bf16),
    "f32": Format(_pack_f32, _value_f32),
}
PRODUCTS = {
    "q4_0": blocks32.product_q4_0,
    "q4_1": blocks32.product_q4_1,
    "q5_0": blocks32.product_q5_0,
    "q5_1": blocks32.product_q5_1,
    "q8_0": blocks32.product_q8_0,
    "q2_k": blocks256.product_q2_k,
    "q3_k": blocks256.product_q3_k,
    "q4_k": blocks256.product_q4_k,
    "q5_k": blocks256.product_q5_k,
    "q6_k": blocks256.product_q6_k,
    "iq4_nl": blocks_table.product_iq4_nl,
    "iq4_xs": blocks_table.product_iq4_xs,
    "mxfp4": blocks_table.product_mxfp4,
}
FLOATS = {
    "f16": load_f16_ir,
    "bf16": _load_bf16_ir,
    "f32": load_ir,
}
