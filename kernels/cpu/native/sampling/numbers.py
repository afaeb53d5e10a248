"""Arithmetic that rounds as `edgeinfer.sampling` does: sort keys, exp, log, random numbers.

A key orders candidates: its high half is the logit, so transformed that ascending keys mean
descending logits, its low half the token id.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import njit, types

from edgeinfer.kernels.cpu.native.operations import add_f, max_f, min_f, mul_f, splat_f64, sub_f
from edgeinfer.kernels.cpu.native.simd import (
    F32,
    F64,
    I32,
    I64,
    Vec,
    call,
    f64x8,
    intp,
    mapped,
    scalar,
)

jit = njit(error_model="numpy")

INF = float("inf")
LARGEST = 3.4028234663852886e38
LN2, LOG2_E = 0.6931471805599453, 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_ROUND = 6755399441055744.0  # 1.5 * 2**52: adding it rounds to an integer
_TAYLOR, *_rest = (1.0 / math.factorial(k) for k in range(9, -1, -1))  # of exp
_TAYLORS = tuple(_rest)
_ODD, *_rest = (1.0 / k for k in range(19, 0, -2))  # of log
_ODDS = tuple(_rest)

# -- instructions --------------------------------------------------------------------------------


def _emit_key(b, x, token):
    """-0 becomes +0 and +inf the largest float; then a monotone map to int32."""
    x = b.fadd(x, F32(0.0))
    x = b.select(b.fcmp_ordered(">", x, F32(LARGEST)), F32(LARGEST), x)
    bits = b.bitcast(x, I32)
    up = b.xor(bits, b.and_(b.ashr(bits, I32(31)), I32(0x7FFFFFFF)))
    return b.or_(b.shl(b.sext(b.not_(up), I64), I64(32)), token)


def _emit_value(b, key):
    up = b.not_(b.trunc(b.ashr(key, I64(32)), I32))
    bits = b.xor(up, b.and_(b.ashr(up, I32(31)), I32(0x7FFFFFFF)))
    return b.fpext(b.bitcast(bits, F32), F64)


def _emit_power(b, t):
    """2**n where t is n + _ROUND: the low bits of t, moved into the exponent."""
    wide = ir.VectorType(I64, 8) if isinstance(t.type, ir.VectorType) else I64
    fill = (lambda n: ir.Constant(wide, [n] * 8)) if wide is not I64 else I64
    moved = b.add(b.shl(b.bitcast(t, wide), fill(52)), fill(1023 << 52))
    return b.bitcast(moved, t.type)


def _emit_sum(b, v):
    for width in (4, 2, 1):
        turn = ir.Constant(ir.VectorType(I32, 8), [(i + width) % 8 for i in range(8)])
        v = b.fadd(v, b.shuffle_vector(v, v, turn))
    return b.extract_element(v, I32(0))


def _emit_kept(b, x, y):
    """y where x is at least -700, else 0."""
    limit = ir.Constant(x.type, [-700.0] * 8)
    return b.select(b.fcmp_ordered(">=", x, limit), y, ir.Constant(x.type, [0.0] * 8))


_f32, _f64 = types.float32, types.float64
key_of = scalar(intp, (_f32, intp), _emit_key)
value_of = scalar(_f64, (intp,), _emit_value)
token_of = scalar(intp, (intp,), lambda b, key: b.and_(key, I64(0xFFFFFFFF)))
narrow = scalar(_f32, (_f64,), lambda b, x: b.fptrunc(x, F32))
widen = scalar(_f64, (_f32,), lambda b, x: b.fpext(x, F64))
widen8 = mapped(
    1, lambda v: Vec("f64", v.lanes), lambda b, x: b.fpext(x, ir.VectorType(F64, x.type.count))
)
sqrt = scalar(_f64, (_f64,), lambda b, x: call(b, "llvm.sqrt.f64", F64, x))
sum8 = scalar(_f64, (f64x8,), _emit_sum)  # lanes l and l + 4, then l + 2, l + 1
_bits = scalar(intp, (_f64,), lambda b, x: b.bitcast(x, I64))
_from_bits = scalar(_f64, (intp,), lambda b, x: b.bitcast(x, F64))
_power1 = scalar(_f64, (_f64,), _emit_power)
_power8 = mapped(1, lambda v: v, _emit_power)
_kept8 = mapped(2, lambda x, y: x, _emit_kept)
_high_product = scalar(
    intp, (intp, intp), lambda b, x, y: b.lshr(b.mul(x, y), I64(32))
)  # of 32-bit numbers


# -- exp and log ---------------------------------------------------------------------------------


@jit
def exp(x):
    """e**x; 0 below -700, and no larger than at 700."""
    inside = x if x > -708.0 else -708.0
    inside = inside if inside < 700.0 else 700.0
    t = inside * LOG2_E + _ROUND
    n = t - _ROUND
    r = (inside - n * _LN2_HIGH) - n * _LN2_LOW
    p = _TAYLOR
    for c in _TAYLORS:
        p = p * r + c
    return p * _power1(t) if x >= -700.0 else 0.0


@jit
def exp8(x):
    """`exp` of every lane."""
    inside = min_f(max_f(x, splat_f64(-708.0)), splat_f64(700.0))
    t = add_f(mul_f(inside, splat_f64(LOG2_E)), splat_f64(_ROUND))
    n = sub_f(t, splat_f64(_ROUND))
    r = sub_f(inside, mul_f(n, splat_f64(_LN2_HIGH)))
    r = sub_f(r, mul_f(n, splat_f64(_LN2_LOW)))
    p = splat_f64(_TAYLOR)
    for c in _TAYLORS:
        p = add_f(mul_f(p, r), splat_f64(c))
    return _kept8(x, mul_f(p, _power8(t)))


@jit
def log(x):
    """Natural logarithm of a positive number."""
    bits = _bits(x)
    e = float((bits >> 52) - 1023)
    m = _from_bits(bits & 0xFFFFFFFFFFFFF | 1023 << 52)
    if m > 1.4142135623730951:
        m, e = m * 0.5, e + 1.0
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = _ODD
    for c in _ODDS:
        p = p * z + c
    return e * _LN2_HIGH + (2.0 * s * p + e * _LN2_LOW)


# -- random numbers ------------------------------------------------------------------------------


@jit
def uniforms(seed, index):
    """Philox4x32-10 (Salmon et al. 2011): two numbers in [0, 1), to draw with and for XTC."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = index & low, (index >> 32) & low, 0, 0
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        a_high, a_low = _high_product(c0, 0xD2511F53), (c0 * 0xD2511F53) & low
        b_high, b_low = _high_product(c2, 0xCD9E8D57), (c2 * 0xCD9E8D57) & low
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return _uniform(c0, c1), _uniform(c2, c3)


@jit
def _uniform(a, b):
    return (float(a >> 5) * 67108864.0 + float(b >> 6)) * 1.1102230246251565e-16
