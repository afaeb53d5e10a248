"""Quantises rows for matmuls, of a value whose own kernel does not. Knows no model."""

from __future__ import annotations

from edgeinfer.kernels.cpu.layout import (
    H_ROWS,
    H_WANTED_ROWS,
    QUANTISE_DIM,
    QUANTISE_ROWS,
    QUANTISE_SINK,
    QUANTISE_STRIDE,
    QUANTISE_X,
    SINK_F32,
    WANTED_ROWS,
)
from edgeinfer.kernels.cpu.native.copy_rows import copy
from edgeinfer.kernels.cpu.native.sink import finish_row, row_at
from edgeinfer.kernels.cpu.native.words import word


def make(isa):
    def kernel(h, a, chunk, thread):
        n_rows = word(h + H_ROWS)
        if word(a + QUANTISE_ROWS) == WANTED_ROWS:
            n_rows = word(h + H_WANTED_ROWS)
        dim, sink = word(a + QUANTISE_DIM), a + QUANTISE_SINK
        x = word(a + QUANTISE_X) + chunk * word(a + QUANTISE_STRIDE)
        out = word(sink + SINK_F32)
        if out != 0 and out != word(a + QUANTISE_X):
            copy(x, row_at(sink, chunk, thread), dim)
        finish_row(x, dim, sink, chunk, n_rows)

    return kernel
