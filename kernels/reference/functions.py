"""Functions and sums of float32 values, the same bits on every machine."""

from __future__ import annotations

import numpy as np

from edgeinfer.kernels.reference.numerics import Floats, f32


def exp(x: Floats) -> Floats:
    """e^x with x clamped to [-87.3, 88.3], 0 below: a polynomial, the same on every machine."""
    f = np.float32
    clamped = np.clip(x, f(-87.3), f(88.3))
    n = np.rint(clamped * f(1.44269504))
    r = fma(n, f(-0.693359375), clamped)
    r = fma(n, f(2.12194440e-4), r)
    p = np.full_like(r, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, r, f(c))
    p = fma(p, r * r, r) + f(1)
    out: Floats = np.where(x < f(-87.3), f(0), np.ldexp(p, n.astype(np.int32)))
    return out


def tanh(x: Floats) -> Floats:
    """A polynomial below 0.625, else 1 - 2 / (e^2|x| + 1) with the sign of x."""
    f, z = np.float32, x * x
    p = np.full_like(x, -5.70498872745e-3)
    for c in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        p = fma(p, z, f(c))
    size = np.abs(x)
    large = f(1) - f(2) / (exp(size + size) + f(1))
    large = np.where(x < 0, -large, large)
    out: Floats = np.where(size < f(0.625), fma(p * z, x, x), large)
    return out


def silu(x: Floats) -> Floats:
    """x / (1 + exp(-x))."""
    out: Floats = x / (np.float32(1) + exp(-x))
    return out


def gelu(x: Floats) -> Floats:
    """w = fma(x * x, 0.044715, 1); (x * 0.5) * (tanh((x * sqrt(2 / pi)) * w) + 1)."""
    f = np.float32
    w = fma(x * x, f(0.044715), f(1))
    out: Floats = (x * f(0.5)) * (tanh((x * f(0.79788456)) * w) + f(1))
    return out


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x))."""
    out: Floats = np.float32(1) / (exp(-x) + np.float32(1))
    return out


def softplus(x: Floats) -> Floats:
    """u = exp(-|x|), s = u / (2 + u), z = s * s: max(x, 0) + (s + s) * (1 + z / 3 + z^2 / 5 ...).

    The series is that of 2 atanh(s) = log(1 + u), up to z^7 / 15, in fma from its end.
    """
    f = np.float32
    u = exp(-np.abs(x))
    s = u / (u + f(2))
    z = s * s
    p = np.full_like(x, 1 / 15)
    for n in (13, 11, 9, 7, 5, 3, 1):
        p = fma(p, z, f(1 / n))
    out: Floats = np.where(x > 0, x, f(0)) + (s + s) * p
    return out


def relu2(x: Floats) -> Floats:
    """The square of what is above 0."""
    y = np.where(x > 0, x, np.float32(0))
    return y * y


def sum_lanes(acc: Floats) -> Floats:
    """Sum (..., 4, 8): (a0 + a1) + (a2 + a3), then lanes l and l + 4, l + 2, l + 1."""
    v = (acc[..., 0, :] + acc[..., 1, :]) + (acc[..., 2, :] + acc[..., 3, :])
    for width in (4, 2, 1):
        v = v[..., :width] + v[..., width : 2 * width]
    return v[..., 0]


def fma(a: Floats | np.float32, b: Floats | np.float32, c: Floats | np.float32) -> Floats:
    """a * b + c rounded once to float32 (results below 2^-126 may be rounded twice)."""
    product = np.multiply(a, b, dtype=np.float64)  # exact
    total = np.asarray(product + c)
    # Where float64 rounding landed on a tie of float32, its error decides the direction.
    is_tie = total.view(np.int64) & 0x1FFFFFFF == 0x10000000
    if is_tie.any():
        part = total - product
        error = (product - (total - part)) + (c - part)
        moved = np.nextafter(total, np.copysign(np.inf, error))
        total = np.where(is_tie & (error != 0), moved, total)
    return f32(total)


def pad(x: Floats, multiple: int) -> Floats:
    """Zeros appended to rows up to a multiple; they change no sum."""
    return np.pad(x, ((0, 0), (0, -x.shape[1] % multiple)))
