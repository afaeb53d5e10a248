"""exp, silu, and sine and cosine, from arithmetic alone: libm differs between systems.

Knows no kernel. The order of every operation is part of the numerics.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit

from edgeinfer.kernels.cpu.native.operations import (
    add_f,
    add_i,
    bits_f32,
    div_f,
    fma,
    max_f,
    min_f,
    mul_f,
    neg_f,
    round_f,
    shift_left,
    splat_f32,
    splat_i32,
    to_i32,
)
from edgeinfer.kernels.cpu.native.simd import mapped
from edgeinfer.kernels.cpu.native.words import fma_f64, round_f64

jit = njit(error_model="numpy")

_LOWEST = -87.3  # exp below is 0
_HIGHEST = 88.3
_LOG2_E = 1.44269504
# ln 2 in two parts, the first with trailing zeros.
_LN2_HIGH, _LN2_LOW = -0.693359375, 2.12194440e-4
_E5, _E4, _E3 = 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3
_E2, _E1, _E0 = 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1

# Zero where x < limit, else v.
_zero_below = mapped(
    3,
    lambda x, limit, v: v,
    lambda b, x, limit, v: b.select(
        b.fcmp_ordered("<", x, limit), ir.Constant(v.type, [0.0] * v.type.count), v
    ),
)


@jit
def exp(x):
    """e ** x of every lane, of vectors or tiles."""
    lowest = splat_f32(_LOWEST)
    # Both yield their second operand where one is NaN: x in this order, which stays NaN.
    clamped = min_f(splat_f32(_HIGHEST), max_f(lowest, x))
    n = round_f(mul_f(clamped, splat_f32(_LOG2_E)))
    r = fma(n, splat_f32(_LN2_HIGH), clamped)
    r = fma(n, splat_f32(_LN2_LOW), r)
    p = fma(splat_f32(_E5), r, splat_f32(_E4))
    p = fma(p, r, splat_f32(_E3))
    p = fma(p, r, splat_f32(_E2))
    p = fma(p, r, splat_f32(_E1))
    p = fma(p, r, splat_f32(_E0))
    p = add_f(fma(p, mul_f(r, r), r), splat_f32(1.0))
    power = bits_f32(shift_left(add_i(to_i32(n), splat_i32(127)), 23))
    return _zero_below(x, lowest, mul_f(p, power))


@jit
def silu(x):
    """x / (1 + e ** -x) of every lane."""
    return div_f(x, add_f(exp(neg_f(x)), splat_f32(1.0)))


# pi / 2 in three doubles, and 2 / pi.
_P1, _P2, _P3 = 1.5707963267948966, 6.123233995736766e-17, -1.4973849048591833e-33
_TWO_OVER_PI = 0.6366197723675814
# Minimax polynomials on [-pi/4, pi/4].
_S1, _S2, _S3 = -1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04
_S4, _S5, _S6 = 2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10
_C1, _C2, _C3 = 4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05
_C4, _C5, _C6 = -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11


@jit
def sincos(x):
    """Sine and cosine of a double, |x| up to 1e13, to 1e-15 of their true values."""
    n = round_f64(x * _TWO_OVER_PI)
    # x - n P1 is exact: a multiple of 2 ** -52 below 1. The rest is kept as high + low.
    r = fma_f64(-n, _P1, x)
    t = n * _P2
    high = r - t
    back = high - r
    low = (r - (high - back)) - (t + back)
    low = low - fma_f64(n, _P2, -t) - n * _P3
    y = high + low
    tail = (high - y) + low
    z = y * y
    cube = z * y
    s = _S2 + z * (_S3 + z * (_S4 + z * (_S5 + z * _S6)))
    s = y - ((z * (0.5 * tail - cube * s) - tail) - cube * _S1)
    w = z * z
    c = z * (_C1 + z * (_C2 + z * _C3)) + w * w * (_C4 + z * (_C5 + z * _C6))
    half = 0.5 * z
    w = 1.0 - half
    c = w + (((1.0 - w) - half) + (z * c - y * tail))
    quadrant = int(n) & 3
    if quadrant & 1:
        s, c = c, s
    if quadrant & 2:
        s = -s
    if (quadrant + 1) & 2:
        c = -c
    return s, c
