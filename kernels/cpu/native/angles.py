"""Cosines and sines of every row's rotation, once a step. Knows no heads."""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.attention_layout import (
    ANGLES_FREQS,
    ANGLES_MAGNITUDES,
    ANGLES_N_MAGNITUDES,
    ANGLES_N_PAIRS,
    ANGLES_OUT,
    ANGLES_PINNED_OUT,
    ANGLES_SPAN,
    ANGLES_TABLES,
)
from edgeinfer.kernels.cpu.native.math import sincos
from edgeinfer.kernels.cpu.native.pages import n_gone, pinned_position, position, table_of
from edgeinfer.kernels.cpu.native.words import load_f64, store_f32, word

jit = njit(error_model="numpy")


def make(isa, is_scaled=""):
    @jit
    def one(a, pos):
        return 1.0

    @jit
    def of_span(a, pos):
        i = min(pos // word(a + ANGLES_SPAN), word(a + ANGLES_N_MAGNITUDES) - 1)
        return load_f64(word(a + ANGLES_MAGNITUDES) + 8 * i)

    magnitude_at = of_span if is_scaled else one

    @jit
    def write(a, pos, out):
        freqs, n_pairs = word(a + ANGLES_FREQS), word(a + ANGLES_N_PAIRS)
        magnitude = magnitude_at(a, pos)
        for i in range(n_pairs):
            s, c = sincos(float(pos) * load_f64(freqs + 8 * i))
            store_f32(out + 4 * i, c * magnitude)
            store_f32(out + 4 * (n_pairs + i), s * magnitude)

    def kernel(h, a, chunk, thread):
        pos, table = position(h, chunk), table_of(h, word(a + ANGLES_TABLES), chunk)
        offset, pinned_out = 8 * word(a + ANGLES_N_PAIRS) * chunk, word(a + ANGLES_PINNED_OUT)
        write(a, pos, word(a + ANGLES_OUT) + offset)
        if pinned_out != 0 and n_gone(table, pos // 32) > 0:
            write(a, pinned_position(table, pos), pinned_out + offset)

    return kernel
