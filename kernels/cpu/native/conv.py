"""Convolves the channels of rows with those before them. Knows no model."""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.layout import (
    CONV_BIAS,
    CONV_BYTES,
    CONV_N_TAPS,
    CONV_OUT,
    CONV_STRIDE,
    CONV_WEIGHT,
    CONV_X,
)
from edgeinfer.kernels.cpu.native.math import silu
from edgeinfer.kernels.cpu.native.operations import add_f, fma, load_f32x8, splat_f32, store_f32x8
from edgeinfer.kernels.cpu.native.runs import first_state, kept_state, rows_of, run_of
from edgeinfer.kernels.cpu.native.words import word

jit = njit(error_model="numpy")


@jit
def _keep(state, n_old, x, n_rows, stride, start, end, to):
    """n_rows rows, the first n_old of a state (0: of zeros), as a state of their own."""
    for j in range(n_rows):
        for at in range(j * stride + start, j * stride + end, 32):
            if j >= n_old:
                store_f32x8(to + at, load_f32x8(x + at))
            else:
                store_f32x8(to + at, load_f32x8(state + at) if state != 0 else splat_f32(0.0))


def make(isa, kind=""):
    is_silu = kind == "silu"

    @jit
    def _row(state, n_old, x, n_taps, stride, weight, bias, start, end, out):
        """A row of the last n_taps, of which the first n_old are a state's (0: zeros)."""
        for at in range(start, end, 32):
            acc = splat_f32(0.0)
            if state != 0:
                for j in range(n_old):
                    row = j * stride + at
                    acc = fma(load_f32x8(weight + row), load_f32x8(state + row), acc)
            else:  # zeros, which leave nothing but of a weight that is no number
                for j in range(n_old):
                    acc = fma(load_f32x8(weight + j * stride + at), splat_f32(0.0), acc)
            for j in range(n_old, n_taps):
                row = j * stride + at
                acc = fma(load_f32x8(weight + row), load_f32x8(x + row), acc)
            if bias != 0:
                acc = add_f(acc, load_f32x8(bias + at))
            store_f32x8(out + at, silu(acc) if is_silu else acc)

    def kernel(h, a, chunk, thread):
        run, part = run_of(a, chunk)
        first, n_rows = rows_of(run)
        state, stride, n_taps = first_state(a, run), word(a + CONV_STRIDE), word(a + CONV_N_TAPS)
        start = part * CONV_BYTES
        end = min(start + CONV_BYTES, stride)
        out = word(a + CONV_OUT) + first * stride
        x = word(a + CONV_X) + (first - n_taps + 1) * stride
        weight, bias = word(a + CONV_WEIGHT), word(a + CONV_BIAS)
        for i in range(n_rows):
            n_old = max(0, n_taps - 1 - i)
            _row(state, n_old, x, n_taps, stride, weight, bias, start, end, out)
            to = kept_state(h, a, first + i)
            x, out = x + stride, out + stride
            state = state + stride if state != 0 else 0
            if to != 0:
                _keep(state, max(0, n_old - 1), x, n_taps - 1, stride, start, end, to)

    return kernel
