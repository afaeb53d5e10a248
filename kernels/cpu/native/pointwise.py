"""Functions of one or two rows, value by value. Knows no model."""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.layout import (
    POINT_A,
    POINT_A_STRIDE,
    POINT_B,
    POINT_B_STRIDE,
    POINT_DIM,
    POINT_PARAMETER,
    POINT_ROWS,
    POINT_SINK,
)
from edgeinfer.kernels.cpu.native.activations import gelu, relu2, sigmoid, softplus, tanh
from edgeinfer.kernels.cpu.native.math import silu
from edgeinfer.kernels.cpu.native.operations import (
    add_f,
    div_f,
    load_f32x8,
    mul_f,
    splat_f32,
    store_f32x8,
)
from edgeinfer.kernels.cpu.native.simd import mapped
from edgeinfer.kernels.cpu.native.sink import finish_row, n_rows_of, row_at
from edgeinfer.kernels.cpu.native.words import load_f32, word

jit = njit(error_model="numpy")


@jit
def _scale(x, factor):
    return mul_f(x, splat_f32(factor))


@jit
def _soft_cap(x, cap):
    return mul_f(tanh(div_f(x, splat_f32(cap))), splat_f32(cap))


# Where x < low, low; where x > high, high.
_at_least = mapped(
    2, lambda x, low: x, lambda b, x, low: b.select(b.fcmp_ordered("<", x, low), low, x)
)
_at_most = mapped(
    2, lambda x, high: x, lambda b, x, high: b.select(b.fcmp_ordered(">", x, high), high, x)
)


@jit
def _clamp(x, low, high):
    return _at_most(_at_least(x, splat_f32(low)), splat_f32(high))


OF_ONE = {
    "silu": silu,
    "gelu": gelu,
    "sigmoid": sigmoid,
    "softplus": softplus,
    "relu2": relu2,
}
OF_TWO = {"add": add_f, "mul": mul_f}
WITH_PARAMETER = {"scale": _scale, "soft_cap": _soft_cap}
WITH_BOUNDS = {"clamp": _clamp}


def _whole_row(kind):
    """The loop over a row of `dim` values: of a, of a and b, of a with one parameter or two."""
    if kind in OF_ONE:
        f = OF_ONE[kind]

        @jit
        def row(a, b, parameter, bound, dim, out):
            for i in range(0, 4 * dim, 32):
                store_f32x8(out + i, f(load_f32x8(a + i)))

    elif kind in OF_TWO:
        f = OF_TWO[kind]

        @jit
        def row(a, b, parameter, bound, dim, out):
            for i in range(0, 4 * dim, 32):
                store_f32x8(out + i, f(load_f32x8(a + i), load_f32x8(b + i)))

    elif kind in WITH_BOUNDS:
        f = WITH_BOUNDS[kind]

        @jit
        def row(a, b, parameter, bound, dim, out):
            for i in range(0, 4 * dim, 32):
                store_f32x8(out + i, f(load_f32x8(a + i), parameter, bound))

    else:
        f = WITH_PARAMETER[kind]

        @jit
        def row(a, b, parameter, bound, dim, out):
            for i in range(0, 4 * dim, 32):
                store_f32x8(out + i, f(load_f32x8(a + i), parameter))

    return row


def make(isa, kind):
    whole_row = _whole_row(kind)

    def kernel(h, a, chunk, thread):
        n_rows = n_rows_of(h, word(a + POINT_ROWS))
        dim, sink = word(a + POINT_DIM), a + POINT_SINK
        first = word(a + POINT_A) + chunk * word(a + POINT_A_STRIDE)
        second = word(a + POINT_B) + chunk * word(a + POINT_B_STRIDE)
        out = row_at(sink, chunk, thread)
        parameter, bound = load_f32(a + POINT_PARAMETER), load_f32(a + POINT_PARAMETER + 4)
        whole_row(first, second, parameter, bound, dim, out)
        finish_row(out, dim, sink, chunk, n_rows)

    return kernel
