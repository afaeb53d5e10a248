"""Rows of floats as matmuls of floats read them: four side by side. Layout: `layout.py`."""

from __future__ import annotations

import numpy as np
from numba import njit

from edgeinfer.kernels.cpu.layout import (
    FOURS_DIM,
    FOURS_OUT,
    FOURS_ROWS,
    FOURS_STRIDE,
    FOURS_X,
    whole_vectors,
)
from edgeinfer.kernels.cpu.native.copy_rows import copy
from edgeinfer.kernels.cpu.native.sink import clear_behind, n_rows_of
from edgeinfer.kernels.cpu.native.words import load_f32, store_f32, word

jit = njit(error_model="numpy")
_whole_vectors = jit(whole_vectors)


@jit
def leave_four(x, stride, n, out):
    """Value i of row r, of 4 rows of n values, at 4 * i + r."""
    for _ in range(n):
        a, b = load_f32(x), load_f32(x + stride)
        c, d = load_f32(x + 2 * stride), load_f32(x + 3 * stride)
        store_f32(out, a)
        store_f32(out + 4, b)
        store_f32(out + 8, c)
        store_f32(out + 12, d)
        x += 4
        out += 16


@jit
def place_in_fours(x, dim, out, i, n_rows):
    """Row i of n_rows, in its place among those at out."""
    n = _whole_vectors(dim)
    if i >= n_rows & -4:
        copy(x, out + 4 * n * i, dim)
        clear_behind(out + 4 * n * i, dim)
        return
    to = out + 4 * n * (i & -4) + 4 * (i & 3)
    for _ in range(dim):
        store_f32(to, load_f32(x))
        x += 4
        to += 16
    for _ in range(n - dim):
        store_f32(to, np.float32(0))
        to += 16


def make(isa):
    def kernel(h, a, chunk, thread):
        if chunk & 3:
            return
        n_rows = n_rows_of(h, word(a + FOURS_ROWS))
        n, stride = _whole_vectors(word(a + FOURS_DIM)), word(a + FOURS_STRIDE)
        x, out = word(a + FOURS_X) + chunk * stride, word(a + FOURS_OUT) + chunk * 4 * n
        if chunk + 4 <= n_rows:
            leave_four(x, stride, n, out)
        else:
            for i in range(n_rows - chunk):
                copy(x + i * stride, out + 4 * i * n, n)

    return kernel
