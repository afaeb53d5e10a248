"""Cosines and sines of every row's rotation, once a step. Knows no heads."""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.layout import (
    ANGLES_FREQS,
    ANGLES_N_PAIRS,
    ANGLES_OUT,
    ANGLES_PINNED_OUT,
)
from edgeinfer.kernels.cpu.native.math import sincos
from edgeinfer.kernels.cpu.native.pages import n_gone, pinned_position, position, table_of
from edgeinfer.kernels.cpu.native.simd import load_f64, store_f32, word

jit = njit(error_model="numpy")


@jit
def _write(pos, freqs, n_pairs, out):
    for i in range(n_pairs):
        s, c = sincos(float(pos) * load_f64(freqs + 8 * i))
        store_f32(out + 4 * i, c)
        store_f32(out + 4 * (n_pairs + i), s)


def make(isa):
    def kernel(h, a, chunk, thread):
        freqs, n_pairs = word(a + ANGLES_FREQS), word(a + ANGLES_N_PAIRS)
        pos, table, offset = position(h, chunk), table_of(h, chunk), 8 * n_pairs * chunk
        _write(pos, freqs, n_pairs, word(a + ANGLES_OUT) + offset)
        pinned_out = word(a + ANGLES_PINNED_OUT)
        if pinned_out != 0 and n_gone(table, pos // 32) > 0:
            _write(pinned_position(table, pos), freqs, n_pairs, pinned_out + offset)

    return kernel
