"""tanh and the activations of feed-forward networks, from arithmetic alone.

Knows no kernel. The order of every operation is part of the numerics.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit

from edgeinfer.kernels.cpu.native.math import exp
from edgeinfer.kernels.cpu.native.operations import (
    abs_f,
    add_f,
    div_f,
    fma,
    max_f,
    mul_f,
    neg_f,
    splat_f32,
    sub_f,
    zero_f32,
)
from edgeinfer.kernels.cpu.native.simd import mapped

jit = njit(error_model="numpy")


def _where_negative(b, x, negative, other):
    zero = ir.Constant(x.type, [0.0] * x.type.count)
    return b.select(b.fcmp_ordered("<", x, zero), negative, other)


# Where x < 0 the second vector, else the third.
where_negative = mapped(3, lambda x, negative, other: other, _where_negative)

_SMALL = 0.625  # tanh below is a polynomial
_T4, _T3, _T2 = -5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2
_T1, _T0 = 1.33314422036e-1, -3.33332819422e-1


@jit
def tanh(x):
    """Of every lane, of vectors or tiles."""
    size, z = abs_f(x), mul_f(x, x)
    p = fma(splat_f32(_T4), z, splat_f32(_T3))
    p = fma(p, z, splat_f32(_T2))
    p = fma(p, z, splat_f32(_T1))
    p = fma(p, z, splat_f32(_T0))
    small = fma(mul_f(p, z), x, x)
    rest = div_f(splat_f32(2.0), add_f(exp(add_f(size, size)), splat_f32(1.0)))
    large = sub_f(splat_f32(1.0), rest)
    large = where_negative(x, neg_f(large), large)
    return where_negative(sub_f(size, splat_f32(_SMALL)), small, large)


@jit
def sigmoid(x):
    """1 / (1 + e ** -x)."""
    return div_f(splat_f32(1.0), add_f(exp(neg_f(x)), splat_f32(1.0)))


_SQRT_2_OVER_PI, _CUBIC = 0.79788456, 0.044715


@jit
def gelu(x):
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x ** 3)))."""
    w = fma(mul_f(x, x), splat_f32(_CUBIC), splat_f32(1.0))
    t = tanh(mul_f(mul_f(x, splat_f32(_SQRT_2_OVER_PI)), w))
    return mul_f(mul_f(x, splat_f32(0.5)), add_f(t, splat_f32(1.0)))


@jit
def softplus(x):
    """log(1 + e ** x) as max(x, 0) + 2 atanh(u / (2 + u)), u = e ** -|x|."""
    u = exp(neg_f(abs_f(x)))
    s = div_f(u, add_f(u, splat_f32(2.0)))
    z = mul_f(s, s)
    p = fma(splat_f32(1 / 15), z, splat_f32(1 / 13))
    p = fma(p, z, splat_f32(1 / 11))
    p = fma(p, z, splat_f32(1 / 9))
    p = fma(p, z, splat_f32(1 / 7))
    p = fma(p, z, splat_f32(1 / 5))
    p = fma(p, z, splat_f32(1 / 3))
    p = fma(p, z, splat_f32(1.0))
    return add_f(max_f(x, zero_f32()), mul_f(add_f(s, s), p))


@jit
def relu2(x):
    """The square of what is above 0."""
    y = max_f(x, zero_f32())
    return mul_f(y, y)
