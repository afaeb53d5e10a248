"""Quantises rows for matmuls, of a value whose own kernel does not. Knows no model."""

from __future__ import annotations

from edgeinfer.kernels.cpu.layout import (
    QUANTISE_DIM,
    QUANTISE_ROWS,
    QUANTISE_SINK,
    QUANTISE_STRIDE,
    QUANTISE_X,
    SINK_F32,
)
from edgeinfer.kernels.cpu.native.copy_rows import copy
from edgeinfer.kernels.cpu.native.sink import finish_row, n_rows_of, row_at
from edgeinfer.kernels.cpu.native.words import word


def make(isa):
    def kernel(h, a, chunk, thread):
        n_rows = n_rows_of(h, word(a + QUANTISE_ROWS))
        dim, sink = word(a + QUANTISE_DIM), a + QUANTISE_SINK
        x = word(a + QUANTISE_X) + chunk * word(a + QUANTISE_STRIDE)
        out = word(sink + SINK_F32)
        if out != 0 and out != word(a + QUANTISE_X):
            copy(x, row_at(sink, chunk, thread), dim)
        finish_row(x, dim, sink, chunk, n_rows)

    return kernel
