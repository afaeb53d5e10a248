"""The gated activation of a feed-forward network. Knows no model."""

from __future__ import annotations

from edgeinfer.kernels.cpu.layout import (
    H_ROWS,
    SWIGLU_DIM,
    SWIGLU_GATE,
    SWIGLU_SINK,
    SWIGLU_STRIDE,
    SWIGLU_UP,
)
from edgeinfer.kernels.cpu.native.math import silu
from edgeinfer.kernels.cpu.native.operations import load_f32x8, mul_f, store_f32x8
from edgeinfer.kernels.cpu.native.sink import finish_row, row_at
from edgeinfer.kernels.cpu.native.words import word


def make(isa):
    def kernel(h, a, chunk, thread):
        dim, sink = word(a + SWIGLU_DIM), a + SWIGLU_SINK
        gate = word(a + SWIGLU_GATE) + chunk * word(a + SWIGLU_STRIDE)
        up = word(a + SWIGLU_UP) + chunk * word(a + SWIGLU_STRIDE)
        out = row_at(sink, chunk, thread)
        for i in range(0, 4 * dim, 32):
            store_f32x8(out + i, mul_f(silu(load_f32x8(gate + i)), load_f32x8(up + i)))
        finish_row(out, dim, sink, chunk, word(h + H_ROWS))

    return kernel
